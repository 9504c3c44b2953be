r"""Tidal: while decoding, a few layers look at every key and choose the best; the layers after them
read only what was chosen.

    layer in `select_layers`:  C_h = the k keys of largest q_h . k_j     (attended in full)
    layers after it:           o_h = softmax attention over C_h          (until the next such layer)
    layers before the first:   in full

Each query head h chooses for itself, and its namesake in the following layers reads its choice;
every decoded token chooses anew and competes with all keys, itself included. `sinks` first and
`always_recent` newest tokens come on top of the k. The prompt is read in full, and no key is ever
dropped.

Differs from the paper: keys of decoded tokens are not recomputed densely from time to time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.moment import Moment, Site
from regard.core.selected import choose
from regard.core.treating import scores_of
from regard.core.treatment import Coincides, Treatment, TreatmentCard, Trial
from regard.importance.by_position import at_positions, by_position
from regard.importance.recency import seen_near


@dataclass(frozen=True)
class Tidal(Treatment):
    """k: keys each query head chooses. select_layers: where it does. always_recent, sinks: newest
    and first tokens that are read besides.
    """

    k: int = 256
    select_layers: tuple[int, ...] = (2, 13)
    always_recent: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.k < 1 or self.always_recent < 0 or self.sinks < 0:
            raise ArgumentError("k, always_recent, sinks", "k >= 1, the others >= 0", self)
        if any(layer < 0 for layer in self.select_layers):
            raise ArgumentError("select_layers", "layer numbers from 0", self.select_layers)

    @property
    def neutral(self) -> bool:
        return not self.select_layers

    def check(self, site: Site, heads: tuple[int, ...]) -> None:
        if self.select_layers and max(self.select_layers) >= site.layers:
            raise ArgumentError(
                "select_layers", f"layers below {site.layers}", list(self.select_layers)
            )

    def visible(self, at: Moment) -> Tensor | None:
        if at.phase == "prefill" or at.site.layer < min(self.select_layers):
            return None
        if at.site.layer in self.select_layers:
            table = by_position(self.chosen(at), at)
            at.shared.update({str(head): table[:, i] for i, head in enumerate(at.heads)})
            return None
        if any(str(head) not in at.shared for head in at.heads):
            first = [n for n in self.select_layers if n < at.site.layer][-1]
            raise UnsupportedError("tidal", f"layer {first}, which chooses, is not in the step")
        return at_positions(torch.stack([at.shared[str(h)] for h in at.heads], 1), at)

    def chosen(self, at: Moment) -> Tensor:
        """The visible keys each query chooses, (B,h,N,M)."""
        seen = at.seen()
        best = choose(scores_of(at), seen, self.k).mask(at.k.shape[2])
        return (best | seen_near(at, self.always_recent, self.sinks)) & seen


CARD = TreatmentCard(
    name="tidal",
    build=Tidal,
    papers=(
        Paper(
            "2410.05076",
            "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
            2024,
        ),
    ),
    claim=Claim(
        "two layers that choose for all the others keep retrieval intact at a few keys per head",
        "regard evaluate --plan tidal.json --task needle",
    ),
    example=Trial({"k": 6, "select_layers": [1], "sinks": 1, "always_recent": 2}),
    neutral={"select_layers": []},
    limits=(Coincides({"k": 10_000, "select_layers": [0]}),),
    gaps={"decoding": "it acts on decoding steps alone"},
)
