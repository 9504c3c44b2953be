r"""Uniform heads: a head gives every key it may see the same weight, whatever it says.

    o_i = 1/n_i sum_{j visible to i} v_j

This is what "masking a head" means in the study of retrieval heads (its queries are set to zero):
the head still averages, it no longer chooses. Silence (output zero) and mean ablation are other
interventions with other names. Padding and the future stay invisible, and the model's own position
bias is taken away with the scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.moment import Moment
from regard.core.treatment import Coincides, Treatment, TreatmentCard, Trial


@dataclass(frozen=True)
class UniformHeads(Treatment):
    """No options: a head chooses, or it does not."""

    def inputs(self, at: Moment) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros_like(at.q), at.k, at.v

    def bias(self, at: Moment) -> Tensor | None:
        """What cancels a bias; entries so low that they hide a key stay."""
        if at.bias is None:
            return None
        hides = at.bias < torch.finfo(at.bias.dtype).min / 2
        return (-at.bias).masked_fill(hides, 0.0)


CARD = TreatmentCard(
    name="uniform_heads",
    build=UniformHeads,
    papers=(
        Paper(
            "2404.15574",
            "Retrieval Head Mechanistically Explains Long-Context Factuality",
            2024,
        ),
    ),
    claim=Claim(
        "a few retrieval heads made uniform destroy retrieval; as many others do not",
        "regard evaluate --plan uniform_heads.json --task needle",
    ),
    example=Trial(layers="1"),
    limits=(Coincides({}, "mechanism", {"operator": "uniform"}),),
)
