r"""Reordering: how block-wise an attention map becomes when its tokens are read in another order.

    sparse = fraction of blocks with at least sigma of their entries below eps
    rough  = mean over blocks of max |x| / mean |x|        (what a shared scale loses)
    score  = a (1 - sparse) / sum of the same + (1 - a) rough / sum of the same, over the orders

The order of lowest score is the best for skipping blocks and for quantising them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def tiles_of_map(weights: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """A map (…,N,M) in blocks, (…,a,b,entries), zeros where the last ones are smaller, and how many
    entries each has (a,b).
    """
    n, m = weights.shape[-2:]
    filled = F.pad(weights, (0, -m % block, 0, -n % block))
    tiles = filled.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).transpose(-3, -2)
    rows, columns = (
        (length - torch.arange(0, length, block, device=weights.device)).clamp_max(block)
        for length in (n, m)
    )
    return tiles.flatten(-2), rows[:, None] * columns


def sparse_share(weights: Tensor, block: int, eps: float = 1e-3, sigma: float = 0.9) -> Tensor:
    """Fraction (…) of the blocks of a map (…,N,M) that are nearly empty."""
    tiles, entries = tiles_of_map(weights, block)
    small = 1 - (tiles >= eps).sum(-1) / entries.to(weights.dtype)
    return (small >= sigma).to(weights.dtype).mean((-2, -1))


def roughness(weights: Tensor, block: int) -> Tensor:
    """Mean (…) over blocks of a map (…,N,M) of its largest entry by its mean one; 1 for a block of
    zeros.
    """
    tiles, entries = tiles_of_map(weights.abs(), block)
    mean = tiles.sum(-1) / entries
    peak = torch.where(mean > 0, tiles.amax(-1) / mean.clamp_min(1e-30), 1.0)
    return peak.mean((-2, -1))


def order_scores(
    reordered: Callable[[int], Tensor], orders: int, block: int, balance: float = 0.5
) -> Tensor:
    """Scores (…,orders), lower is better, of the maps reordered(i) (…,N,N); balance is `a`."""
    maps = (reordered(i) for i in range(orders))
    pairs = [(1 - sparse_share(x, block), roughness(x, block)) for x in maps]
    dense, rough = (torch.stack(part, -1) for part in zip(*pairs, strict=True))
    shares = (x / x.sum(-1, keepdim=True).clamp_min(1e-30) for x in (dense, rough))
    return sum(w * x for w, x in zip((balance, 1 - balance), shares, strict=True))  # type: ignore[return-value]


def largest_blocks(weights: Tensor, block: int, density: float) -> Tensor:
    """Which blocks (…,a,b) of a map (…,N,M) have the largest sums: a fraction `density` of them."""
    sums = tiles_of_map(weights, block)[0].sum(-1).flatten(-2)
    count = max(1, round(density * sums.shape[-1]))
    order = sums.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1)
    a = -(-weights.shape[-2] // block)
    return (rank < count).unflatten(-1, (a, -1))
