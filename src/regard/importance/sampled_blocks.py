r"""Sampled blocks: how much a block of queries wants a block of keys, judged by a few of each.

    S_ab = max over sampled i in block a, j in block b of softmax_j(q_i . k_j s)

The samples stand at the same offsets in every block; the softmax runs over all sampled keys that a
query may see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.weights import Softmax, group_scores


def spread(samples: int, block: int) -> Tensor:
    """Offsets of samples in a block, in the middle of equal parts."""
    samples = min(samples, block)
    return (2 * torch.arange(samples) + 1) * block // (2 * samples)


def sampled_importance(
    q: Tensor, k: Tensor, real: Tensor, block: int, samples: int, scale: float, *, causal: bool
) -> Tensor:
    """S (B,H,n,n) of q (B,H,n*block,D), k (B,H_k,n*block,D), real ones first: real (B or 1, ·).

    In a causal call the first query of a block speaks for it, and sees what is not after it.
    """
    own = spread(1 if causal else samples, block).to(q.device) * (0 if causal else 1)
    rows, seen = _places(own, real, block)
    columns, theirs = _places(spread(samples, block).to(q.device), real, block)
    visible = (seen[:, :, None] & theirs[:, None])[:, None]
    if causal:
        visible = visible & (columns[:, None] <= rows[:, :, None])[:, None]
    scores = group_scores(_taken(q, rows), _taken(k, columns)) * scale
    weights = Softmax()(scores, visible, visible.sum(-1, keepdim=True))
    tiles = weights.unflatten(3, (-1, columns.shape[1] * block // k.shape[2]))
    return tiles.amax(-1).unflatten(2, (-1, rows.shape[1] * block // q.shape[2])).amax(3)


def _places(offsets: Tensor, real: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Indices (B or 1, n*s) of the samples, within the real tokens of a block, and which blocks
    have any.
    """
    count = real.unflatten(1, (-1, block)).sum(-1)[..., None]  # (B,n,1)
    start = torch.arange(count.shape[1], device=real.device)[:, None] * block
    return (start + offsets % count.clamp_min(1)).flatten(1), (count > 0).expand(
        -1, -1, len(offsets)
    ).flatten(1)


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """Rows index (B or 1, m) of x (B,H,N,D)."""
    index = index.expand(x.shape[0], -1)[:, None, :, None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
