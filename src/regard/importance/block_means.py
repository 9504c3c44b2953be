"""Block means: how much a query wants a block of keys, judged by the mean key of the block."""

from __future__ import annotations

from torch import Tensor

from regard.core.weights import group_scores


def mean_keys(k: Tensor, real: Tensor, block: int) -> Tensor:
    """Mean of the real keys in each block: k (B,H_k,C*block,D), real (B or 1, C*block) ->
    (B,H_k,C,D); a block without any gives zeros.
    """
    kept = k.masked_fill(~real[:, None, :, None], 0.0).unflatten(2, (-1, block)).sum(3)
    count = real.unflatten(1, (-1, block)).sum(-1).clamp_min(1)
    return kept / count[:, None, :, None]


def block_scores(q: Tensor, k: Tensor, real: Tensor, block: int) -> Tensor:
    """q (B,H,N,D) against the mean keys of blocks: (B,H,N,C)."""
    return group_scores(q, mean_keys(k, real, block))
