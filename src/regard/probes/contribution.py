r"""Contribution: how much of a layer's attention output each head makes, before the projection.

    output_norm_h = mean_i |o_hi|        output_share_h = mean_i |o_hi|^2 / sum_g |o_gi|^2

o_hi (E) is what head h hands to the projection for query i. The shares of a layer's heads sum to
one; a query that gets nothing from any head counts nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import UnsupportedError
from regard.core.observe import Seen
from regard.core.probe import Finding, Look, ProbeCard, mean_of_rows


@dataclass(frozen=True)
class Contribution:
    """Norms of the heads' outputs and their shares."""

    def begin(self, look: Look) -> _Outputs:
        if look.output is None:
            raise UnsupportedError("contribution", "the output of the heads is not known")
        return _Outputs(look, look.output)


class _Outputs:
    def __init__(self, look: Look, output: Tensor) -> None:
        self.look, self.output = look, output

    def add(self, seen: Seen) -> None:
        """Weights say nothing about it."""

    def found(self) -> Finding:
        look = self.look
        norms = self.output.double().norm(dim=-1)
        total = norms.square().sum(1, keepdim=True)
        share = (norms.square() / total).masked_fill(total == 0, 0.0)
        some = look.real_queries & (total[:, 0] > 0)
        return Finding(
            {
                "output_norm": mean_of_rows(norms, look.real_queries),
                "output_share": mean_of_rows(share, some),
            }
        )


CARD = ProbeCard(
    name="contribution",
    build=Contribution,
    metrics={
        "output_norm": "mean norm of what the head hands to the output projection",
        "output_share": "its share of the squared norm of all heads together, 0 to 1",
    },
    papers=(
        Paper(
            "2405.03205",
            "Anchored Answers: Unravelling Positional Bias in GPT-2's Multiple-Choice Questions",
            2024,
        ),
    ),
    claim=Claim("a few heads of a layer make most of its output", "regard atlas"),
)
