r"""Swap columns: two keys exchange the weight that a query gives them.

    A'_i,first = A_i,second        A'_i,second = A_i,first        all else as it was

For the last query of each forward, or for every one. A query that does not see both keys is left as
it is. It tells whether a head's answer hangs on which of two places it looks at: an option that is
always chosen for standing first, against the right one.
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
from regard.core.treatment import Treatment, TreatmentCard, Trial


@dataclass(frozen=True)
class SwapColumns(Treatment):
    """first, second: the keys, as numbers of real tokens before them; equal ones change nothing.
    queries: the last one of each forward (while decoding, every new one), or every one.
    """

    first: int = 0
    second: int = 1
    queries: Literal["last", "every"] = "last"

    def __post_init__(self) -> None:
        if min(self.first, self.second) < 0:
            raise ArgumentError("first, second", "0 or more", (self.first, self.second))

    @property
    def neutral(self) -> bool:
        return self.first == self.second

    def weights(self, weights: Tensor, at: Moment) -> Tensor:
        ours = [keys_at(at, (key,))[:, :, None] & at.seen() for key in (self.first, self.second)]
        first, second = (
            weights.masked_fill(~mine, 0.0).sum(-1, keepdim=True) for mine in reversed(ours)
        )
        both = ours[0].any(-1, keepdim=True) & ours[1].any(-1, keepdim=True)
        both = both & rows_that(at, self.queries)[:, None, :, None]
        swapped = torch.where(ours[0], first, torch.where(ours[1], second, weights))
        return torch.where(both, swapped, weights)


CARD = TreatmentCard(
    name="swap_columns",
    build=SwapColumns,
    papers=(
        Paper(
            "2405.03205",
            "Anchored Answers: Unravelling Positional Bias in GPT-2's Multiple-Choice Questions",
            2024,
        ),
    ),
    claim=Claim(
        "a head that names the first option names the other once their weights are swapped",
        "regard evaluate --plan swap_columns.json --task needle",
    ),
    example=Trial({"first": 2, "second": 5, "queries": "every"}),
    neutral={"first": 3, "second": 3},
)
