r"""Initial token: the weight of the first token is scaled by gamma, and rows sum to one again.

    A'_i0 = gamma A_i0 / D_i    A'_ij = A_ij / D_i    D_i = 1 + (gamma - 1) A_i0

which is softmax with log gamma added to the scores of the first key, so a fused kernel and a cached
key will do. gamma above 1 flattens the differences between the other keys, below 1 sharpens them;
their proportions stay. gamma = 0 hides the first token from every row that sees another one. The
first *real* token is meant, wherever padding puts it; it is content where a model begins sequences
with no token of its own. A head that evicted it is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regard.core.card import Claim, Golden, Paper
from regard.core.errors import ArgumentError
from regard.core.maps import treated_maps
from regard.core.moment import Moment
from regard.core.treatment import Treatment, TreatmentCard, Trial
from regard.core.weights import repeat_heads


@dataclass(frozen=True)
class InitialToken(Treatment):
    """gamma: factor on the first token's weight, at least 0; 1 changes nothing."""

    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise ArgumentError("gamma", "a number from 0 up", self.gamma)

    @property
    def neutral(self) -> bool:
        return self.gamma == 1.0

    def bias(self, at: Moment) -> Tensor | None:
        if self.gamma == 0:
            return None
        first = first_key(at)
        return at.q.new_zeros(first.shape).masked_fill(first, math.log(self.gamma))

    def visible(self, at: Moment) -> Tensor | None:
        if self.gamma != 0:
            return None
        others = ~first_key(at)
        return others | ~(at.seen() & others).any(-1, keepdim=True)


def first_key(at: Moment) -> Tensor:
    """Which key is the first real token, (B,h or 1,1,M)."""
    first = at.real & (at.key_positions == 0)
    heads = 1 if first.shape[1] == 1 else at.q.shape[1]
    return repeat_heads(first, heads)[:, :, None]


def replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' map of one golden case: of the three that each case holds, its own setting's."""
    config, number = case["config"], setting(case)
    maps = case["inputs"][f"A{number}"]
    heads = range(maps.shape[1]) if config["heads"] is None else config["heads"]
    if config["layers"] is not None and config["layer_idx"] not in config["layers"]:
        heads = ()
    return {f"A_out{number}": treated_maps(maps, InitialToken(config["rate"]), heads=tuple(heads))}


def setting(case: Mapping[str, Any]) -> int:
    """Which of the file's settings a case has: all heads, some heads, some layers."""
    config = case["config"]
    return 2 if config["layers"] is not None else 1 if config["heads"] is not None else 0


CARD = TreatmentCard(
    name="initial_token",
    build=InitialToken,
    papers=(Paper("2505.11739", "ZeroTuning: Unlocking the Initial Token's Power", 2025),),
    claim=Claim(
        "one number per head on the first token moves what the other tokens compete for",
        "regard evaluate --plan initial_token.json --task needle,perplexity",
    ),
    example=Trial({"gamma": 4.0}),
    neutral={"gamma": 1.0},
    goldens=tuple(
        Golden(
            "37_zerotuning.pt",
            replay,
            "https://github.com/FeijiangHan/ZeroTuning",
            "51df35b",
            leaves={f"A_out{i}": "of another case's setting" for i in range(3) if i != number},
            only=lambda case, number=number: setting(case) == number,
        )
        for number in range(3)
    ),
)
