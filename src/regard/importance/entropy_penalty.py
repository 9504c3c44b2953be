r"""Entropy penalty: pulls the entropy of every head into a band around its own target.

    d_lh = E_lh - theta_lh ln T        penalty = mean_l mean_h d_lh^2 where |d_lh| > margin ln T
    E_lh = mean_i H(A_lhi), in nats, over queries and sequences        theta: fraction of ln T

Inside the band nothing pulls. Causal rows cannot reach ln T: query i sees i keys.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from regard.core.errors import ArgumentError

FLOOR = 1e-9
"""Added to a weight before its logarithm."""

Reduction = Literal["mean", "sum_tokens"]


def row_entropies(maps: Tensor) -> Tensor:
    """Entropies (…,N), in nats, of the rows of maps (…,N,M)."""
    return -(maps * (maps + FLOOR).log()).sum(-1)


def entropy_penalty(
    maps: Tensor,
    targets: Tensor,
    *,
    margin: float = 0.2,
    weight: float = 1e-5,
    reduction: Reduction = "mean",
) -> Tensor:
    """The penalty (scalar), times weight, of maps (L,B,H,N,T) of L layers with targets theta (L,H)
    or (H,).

    reduction: "mean" judges the mean entropy of a head, as the paper has it; "sum_tokens" judges
    the entropy of every query by itself and sums over queries and sequences, as its code does.

    Raises:
        ArgumentError: other shapes, a negative margin, an unknown reduction.
    """
    fits = maps.ndim == 5 and targets.shape in (maps.shape[::2][:2], maps.shape[2:3])
    if not fits:
        raise ArgumentError("targets", "(L,H) or (H,) of maps (L,B,H,N,T)", tuple(targets.shape))
    if margin < 0:
        raise ArgumentError("margin", "0 or more", margin)
    if reduction not in ("mean", "sum_tokens"):
        raise ArgumentError("reduction", "'mean' or 'sum_tokens'", reduction)
    most = math.log(maps.shape[-1])
    entropy = row_entropies(maps)  # (L,B,H,N)
    if reduction == "mean":
        entropy = entropy.mean((1, 3), keepdim=True)
    wanted = targets.expand(len(maps), -1)[:, None, :, None] * most
    gap = entropy - wanted
    outside = gap.square() * (gap.abs() > margin * most)
    return weight * outside.sum((1, 3)).mean()
