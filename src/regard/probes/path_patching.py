r"""Path patching: what a head would have said in another prompt, sent along the direct path alone.

    1. x, contrast x': outputs z, z' of all heads; D = logit(right) - logit(wrong): D_0, D_1
    2. x with z_h <- z'_h, every other head held at its z: what the receivers hear is recorded
    3. x with the receivers' hearing replaced by it: D_h        score_h = (D_h - D_0) / (D_1 - D_0)

Receivers are the logits, or (layer, head, component) with a query, key, value or output. Heads are
held, sent and heard at one token alone, the last one if nothing else is said; the feed-forward
parts there follow what they hear unless they are frozen too. D_1 - D_0 is the mean over all
passages, so that a score does not hang on how they are batched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.answers import LAST, answer_gap
from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.moment import Site
from regard.core.outputs import stacked
from regard.core.passage import Passage
from regard.core.probe import Finding, ProbeCard
from regard.core.scene import Scene
from regard.probes.paths import Pair
from regard.probes.receivers import Receiver, check_receivers

WHO = "path_patching"


@dataclass(frozen=True)
class PathPatching:
    """receivers: none are the logits. position: of the token at which heads are patched, counting
    real ones, negative from the end; None: all of them. freeze_mlps: hold the feed-forward parts
    too. Senders are the heads up to the first receivers' layer.
    """

    receivers: tuple[Receiver, ...] = ()
    position: int | None = LAST
    freeze_mlps: bool = False

    def __post_init__(self) -> None:
        if not self.receivers and self.position not in (LAST, None):
            raise ArgumentError("position", "the last, where the logits are read", self.position)

    @torch.no_grad()
    def run(self, scene: Scene) -> Iterator[tuple[Passage, Site, Finding]]:
        check_receivers(self.receivers, scene)
        span = mean_span(scene)
        last = min((layer for layer, _, _ in self.receivers), default=len(scene.chain) - 1)
        for passage in scene.passages:
            pair = Pair.of(scene, passage, self.position, self.freeze_mlps)
            start = answer_gap(pair.before, passage, WHO).double()
            for site in scene.chain[: last + 1]:
                rows = [self._shift(pair, site, h, start) for h in range(site.heads)]
                shift = stacked(rows)
                metrics = {"path_effect": shift / span, "path_shift": shift}
                yield passage, site, Finding(metrics)

    def _shift(self, pair: Pair, site: Site, head: int, start: Tensor) -> Tensor:
        """What the gap between the answers gains (B,); NaN for a receiver itself."""
        if any((site.layer, head) == receiver[:2] for receiver in self.receivers):
            return torch.full_like(start, torch.nan)
        logits = pair.sent(site, head, self.receivers)
        return answer_gap(logits, pair.passage, WHO).double() - start


def mean_span(scene: Scene) -> Tensor:
    """By how much contrasts move the gap between right and wrong answer, the mean over all
    sequences; NaN if they do not move it.
    """
    moved = []
    for passage in scene.passages:
        pair = Pair.of(scene, passage, LAST, False)
        moved.append(answer_gap(pair.after, passage, WHO) - answer_gap(pair.before, passage, WHO))
    span = torch.cat(moved).double().mean()
    return span.masked_fill(span == 0, torch.nan)


CARD = ProbeCard(
    name=WHO,
    build=PathPatching,
    metrics={
        "path_effect": "share of the contrast's effect on the answer that the head sends directly",
        "path_shift": "change of right less wrong logit by what the head sends directly",
    },
    papers=(
        Paper(
            "2310.08744",
            "Circuit Component Reuse Across Tasks in Transformer Language Models",
            2023,
        ),
    ),
    claim=Claim("a few heads carry the answer to the logits", "regard atlas"),
)
