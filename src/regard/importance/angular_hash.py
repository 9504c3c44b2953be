r"""Angular hashing: vectors that point the same way fall into the same bucket, those that nearly do
into the next.

    bits_r = x . p_r > 0        bucket = place of the bits in the Gray order

The order counts so that neighbouring buckets differ in one bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.importance.drawn import drawn_normal


@dataclass(frozen=True, eq=False)
class AngularHash:
    """directions (D,r); order (2^r,): the bucket of each pattern of bits, first bit lowest."""

    directions: Tensor
    order: Tensor

    def buckets(self, x: Tensor) -> Tensor:
        """Buckets (…,N) of x (…,N,D); no gradient."""
        bits = (x.detach() @ self.directions.to(x.dtype)) > 0
        values = 2 ** torch.arange(bits.shape[-1], device=x.device)
        return self.order[(bits * values).sum(-1)]


def angular_hash(width: int, projections: int, seed: int, device: torch.device) -> AngularHash:
    """Random directions, and the Gray order: bucket i holds the bits of i XOR i // 2."""
    directions = drawn_normal(seed, width * projections, device).view(width, projections)
    number = torch.arange(2**projections, device=device)
    order = torch.zeros_like(number).scatter(0, number ^ (number >> 1), number)
    return AngularHash(directions, order)
