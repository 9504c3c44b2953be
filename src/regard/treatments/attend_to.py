r"""Attend to: a query looks at given keys alone, at all of them alike.

    A'_ij = 1/|S_i| for j in S_i, 0 for all others        S_i: the given keys that query i sees

For the last query of each forward, or for every one. A query that sees none of them is left as it
is. Writing the row of a few heads repairs a task whose circuit is there but looks elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.moment import Moment
from regard.core.some_rows import keys_at, rows_that
from regard.core.treatment import Coincides, Treatment, TreatmentCard, Trial

MANY = list(range(256))
"""More keys than the contract's sequences have."""


@dataclass(frozen=True)
class AttendTo(Treatment):
    """positions: the keys, as numbers of real tokens before them; without any, nothing changes.
    queries: the last one of each forward (while decoding, every new one), or every one.
    """

    positions: tuple[int, ...] = ()
    queries: Literal["last", "every"] = "last"

    def __post_init__(self) -> None:
        if min(self.positions, default=0) < 0:
            raise ArgumentError("positions", "0 or more each", self.positions)

    @property
    def neutral(self) -> bool:
        return not self.positions

    def weights(self, weights: Tensor, at: Moment) -> Tensor:
        given = (keys_at(at, self.positions)[:, :, None] & at.seen()).expand_as(weights)
        count = given.sum(-1, keepdim=True)
        changed = (count > 0) & rows_that(at, self.queries)[:, None, :, None]
        alike = given.to(weights.dtype) / count.clamp_min(1)
        return torch.where(changed, alike, weights)


CARD = TreatmentCard(
    name="attend_to",
    build=AttendTo,
    papers=(
        Paper(
            "2310.08744",
            "Circuit Component Reuse Across Tasks in Transformer Language Models",
            2023,
        ),
    ),
    claim=Claim(
        "a head that is made to look at the fact names it",
        "regard evaluate --plan attend_to.json --task needle",
    ),
    example=Trial({"positions": [2, 5], "queries": "every"}, layers="1"),
    neutral={"positions": []},
    limits=(Coincides({"positions": MANY, "queries": "every"}, "uniform_heads"),),
)
