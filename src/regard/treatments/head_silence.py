r"""Head silence: a head gives nothing to the output projection.

    o_i <- 0

The head's place in the output projection stays, its bias too. A head that is silent in every call
still fills its cache; `layer_drop` saves that, for whole layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.moment import Moment
from regard.core.treatment import Coincides, Treatment, TreatmentCard, Trial


@dataclass(frozen=True)
class HeadSilence(Treatment):
    """No options."""

    def output(self, output: Tensor, at: Moment) -> Tensor:
        return torch.zeros_like(output)


CARD = TreatmentCard(
    name="head_silence",
    build=HeadSilence,
    papers=(Paper("1905.10650", "Are Sixteen Heads Really Better than One?", 2019),),
    claim=Claim(
        "many heads can be silenced one at a time at little cost",
        "regard evaluate --plan head_silence.json --task needle,perplexity",
    ),
    example=Trial(layers="1"),
    limits=(Coincides({}, "layer_drop", {"sublayer": "attention"}),),
)
