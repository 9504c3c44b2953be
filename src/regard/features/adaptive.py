r"""Adaptive pooling: any number of tokens becomes a fixed number of means, whatever their number.

    p_m = mean of x_j over m T / n <= rank_j < (m+1) T / n, borders rounded outwards

T tokens fall into n runs of nearly equal length, which overlap by a token where n does not divide
T; on a (h,w) grid into sqrt(n) x sqrt(n) blocks. Padded tokens are left out of the means, prefix
tokens are not pooled.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.errors import ArgumentError


def adaptive_means(x: Tensor, members: Tensor) -> Tensor:
    """x (B,H,N,D) averaged over the members (B or 1, n, N) of each cell -> (B,H,n,D); zero where a
    cell is empty.
    """
    share = members.to(x.dtype) / members.sum(-1, keepdim=True).clamp_min(1)
    return share[:, None] @ x


def runs(parts: int, real: Tensor, prefix: int = 0) -> Tensor:
    """Members (B,n,N) of `parts` runs of the real tokens (B,N) after the first `prefix` of them."""
    rank = real.cumsum(-1) - 1 - prefix
    size = (real.sum(-1, keepdim=True) - prefix).clamp_min(0)
    return _within(rank, size, parts) & real[:, None]


def blocks(parts: int, grid: tuple[int, ...], real: Tensor, prefix: int = 0) -> Tensor:
    """Members (B,n,N) of a square number of blocks of a (h,w) grid that follows `prefix` tokens;
    real (B,N).

    Raises:
        ArgumentError: `parts` is no square, or the grid does not hold N - prefix tokens.
    """
    side = math.isqrt(parts)
    if side * side != parts:
        raise ArgumentError("agents", "a square number on a (h,w) grid", parts)
    high, wide = (_of_side(length, side, real.device) for length in grid)  # (side,h) and (side,w)
    cells = (high[:, None, :, None] & wide[:, None]).flatten(2).flatten(0, 1)  # (n,h*w)
    if prefix + cells.shape[1] != real.shape[1]:
        raise ArgumentError("call.grid", f"{real.shape[1] - prefix} cells, to pool from", grid)
    return F.pad(cells, (prefix, 0)) & real[:, None]


def _of_side(length: int, parts: int, device: torch.device) -> Tensor:
    rank = torch.arange(length, device=device)
    return _within(rank, torch.full_like(rank[:1], length), parts)


def _within(rank: Tensor, size: Tensor, parts: int) -> Tensor:
    """Which ranks (…,N) of `size` (…,1) tokens are in each of `parts` runs, (…,n,N)."""
    run = torch.arange(parts, device=rank.device)[:, None]
    start = run * size[..., None] // parts
    stop = -(-(run + 1) * size[..., None] // parts)
    return (rank[..., None, :] >= start) & (rank[..., None, :] < stop)
