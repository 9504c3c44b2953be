r"""Attention influence: how much worse a text is predicted when heads no longer choose.

    score(x) = (L'(x) - L(x)) / L(x)        L': loss with A_ij = 1/n_i in those heads

Head by head it is a metric of heads. For a set of heads that retrieve, all at once, it is a score
of texts (`attention_influence`): those that need retrieval most come first. n_i keys are visible to
query i, so that nothing of the future leaks in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.moment import Site
from regard.core.outputs import stacked
from regard.core.passage import Passage
from regard.core.predictions import Predictions
from regard.core.probe import Finding, ProbeCard
from regard.core.scene import Scene, chosen
from regard.probes.ablation import ablated
from regard.treatments.uniform_heads import UniformHeads


@dataclass(frozen=True)
class Influence:
    """No options; one forward per head and passage."""

    @torch.no_grad()
    def run(self, scene: Scene) -> Iterator[tuple[Passage, Site, Finding]]:
        for passage in scene.passages:
            loss = Predictions.of(scene.model(**passage.inputs), passage).losses()
            for site, after in ablated(scene, passage, UniformHeads()):
                rise = stacked([(p.losses() - loss) / loss for p in after])
                yield passage, site, Finding({"influence": rise})


@torch.no_grad()
def attention_influence(scene: Scene, heads: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
    """The score (B,) of every sequence of each passage, with these (layer, head) of the model's
    self-attention uniform at once.

    Raises:
        ArgumentError: a head the model does not have.
    """
    known = {(site.layer, h): site for site in scene.chain for h in range(site.heads)}
    missing = [head for head in heads if head not in known]
    if missing:
        raise ArgumentError("heads", "(layer, head) of the model", missing)
    by_site: dict[str, list[int]] = {}
    for head in dict.fromkeys(heads):
        by_site.setdefault(known[head].name, []).append(head[1])
    steps = {name: [chosen(UniformHeads(), sorted(mine))] for name, mine in by_site.items()}
    for passage in scene.passages:
        losses = []
        for changed in (False, True):
            with ExitStack() as stack:
                if changed and steps:
                    stack.enter_context(scene.run(steps))
                losses.append(Predictions.of(scene.model(**passage.inputs), passage).losses())
        yield (losses[1] - losses[0]) / losses[0]


CARD = ProbeCard(
    name="influence",
    build=Influence,
    metrics={"influence": "rise of the loss when the head attends to all keys alike, relative"},
    papers=(
        Paper(
            "2505.07293",
            "AttentionInfluence: Adopting Attention Head Influence for Weak-to-Strong Pretraining "
            "Data Selection",
            2025,
        ),
    ),
    claim=Claim("texts that repeat need the heads that retrieve", "regard atlas"),
)
