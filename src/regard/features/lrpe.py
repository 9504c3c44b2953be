r"""Linearized relative position encoding: features turn with the position, by learned angles.

    phi(x)_t = [x cos(theta t), x sin(theta t)]        x: (B,H,N,D) -> (B,H,N,2D)

phi(q)_i . phi(k)_j = sum_d q_d k_d cos(theta_d (i - j)) depends on the distance only. theta (H,D)
starts at 10000^(-2m/(H D)), m = 0..H D - 1 counted through all heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Lrpe(nn.Module):
    """Doubles the width D of every head; theta (heads, D) is learned."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        theta = 10000.0 ** (-2.0 / width * torch.arange(width))
        self.theta = nn.Parameter(theta.reshape(heads, head_dim))

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """q, k (B,H,N,D) at integer positions (B or 1, N) -> both as (B,H,N,2D)."""
        turns = positions[:, None, :, None] * self.theta.double()[:, None] % (2 * math.pi)
        angles = turns.to(torch.promote_types(q.dtype, torch.float32))
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
        return torch.cat([q * cos, q * sin], -1), torch.cat([k * cos, k * sin], -1)
