r"""Activation patching: a head gives what it gives in another prompt, and all follows from it.

    z_h <- z'_h        score_h = (D_h - D_0) / (D_1 - D_0)        D = logit(right) - logit(wrong)

D_0 is of the passage, D_1 of its contrast. Path patching counts the direct path alone; this counts
every path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from regard.core.answers import answer_gap
from regard.core.card import Claim, Paper
from regard.core.moment import Site
from regard.core.outputs import stacked
from regard.core.passage import Passage
from regard.core.probe import Finding, ProbeCard
from regard.core.scene import Scene
from regard.probes.path_patching import mean_span
from regard.probes.paths import Pair

WHO = "activation_patching"


@dataclass(frozen=True)
class ActivationPatching:
    """position: of the token at which a head is patched, counting real ones, negative from the end;
    None: all of them.
    """

    position: int | None = None

    @torch.no_grad()
    def run(self, scene: Scene) -> Iterator[tuple[Passage, Site, Finding]]:
        span = mean_span(scene)
        for passage in scene.passages:
            pair = Pair.of(scene, passage, self.position, False)
            start = answer_gap(pair.before, passage, WHO).double()
            for site in scene.chain:
                logits = (pair.swapped(site, head) for head in range(site.heads))
                gaps = [answer_gap(x, passage, WHO).double() - start for x in logits]
                metrics = {"patch_effect": stacked(gaps) / span, "patch_shift": stacked(gaps)}
                yield passage, site, Finding(metrics)


CARD = ProbeCard(
    name=WHO,
    build=ActivationPatching,
    metrics={
        "patch_effect": "share of the contrast's effect on the answer that the head brings about",
        "patch_shift": "change of right less wrong logit with the contrast's head output",
    },
    papers=(
        Paper(
            "2211.00593",
            "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 "
            "small",
            2022,
        ),
    ),
    claim=Claim("the heads that matter to an answer are few", "regard atlas"),
)
