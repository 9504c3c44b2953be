r"""Head gain: what a head gives is scaled by gamma before the output projection.

o_i <- gamma o_i
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.moment import Moment
from regard.core.treatment import Coincides, Treatment, TreatmentCard, Trial


@dataclass(frozen=True)
class HeadGain(Treatment):
    """gamma: any finite factor; 1 changes nothing, 0 silences, -1 turns the head against itself."""

    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.gamma):
            raise ArgumentError("gamma", "a finite number", self.gamma)

    @property
    def neutral(self) -> bool:
        return self.gamma == 1.0

    def output(self, output: Tensor, at: Moment) -> Tensor:
        return output * self.gamma


CARD = TreatmentCard(
    name="head_gain",
    build=HeadGain,
    papers=(Paper("1905.10650", "Are Sixteen Heads Really Better than One?", 2019),),
    claim=Claim(
        "turning a head up or down shows which way it pushes the answer",
        "regard evaluate --plan head_gain.json --task needle,perplexity",
    ),
    example=Trial({"gamma": 0.5}),
    neutral={"gamma": 1.0},
    limits=(Coincides({"gamma": 0.0}, "head_silence"),),
)
