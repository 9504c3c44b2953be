r"""Pyramid levels: how coarsely a block of queries may read each block of keys, from how much it
wants it.

    E_c = share of importance of block c and of all that matter more        (falling order)
    factor_c = f_t, the first t with  E before c <= threshold_t;  0 (skip) if there is none

factors f = 1, 2, 4, 8 are numbers of neighbouring keys that are read as their mean. Counting what
stands before a block, not up to it, gives the most important one factor 1 however large its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

FACTORS = (1, 2, 4, 8)
Rule = Literal["mass", "rank"]


def pooling_factors(
    importance: Tensor,
    allowed: Tensor,
    thresholds: Sequence[float],
    *,
    rule: Rule = "mass",
    least: float = 0.0,
    multiples: Sequence[int] = (1, 1, 1, 1),
    inclusive: bool = True,
) -> Tensor:
    """Factors (B,H,nq,nk), 0 where a block is skipped or not `allowed` (broadcastable).

    importance: non-negative. thresholds: rising, one per factor; fractions of the importance of a
    row, or with rule "rank" of its number of blocks. least: fraction of blocks that have factor 1
    at any rate. multiples: numbers of blocks per factor are rounded up to these. inclusive: judge a
    block by what stands before it; False, as printed in the paper, by what it adds up to, itself
    included, so that a first block above every threshold is skipped.
    """
    judged = importance.masked_fill(~allowed, -1.0)
    falling, order = judged.sort(dim=-1, descending=True, stable=True)
    share = falling.clamp_min(0.0).cumsum(-1)
    share = share / share[..., -1:].clamp_min(torch.finfo(share.dtype).tiny)
    blocks = allowed.expand_as(importance).sum(-1, keepdim=True)
    rank = torch.arange(importance.shape[-1], device=importance.device)
    start, ranked = torch.zeros_like(blocks), torch.zeros_like(order)
    for factor, threshold, multiple in zip(FACTORS, thresholds, multiples, strict=True):
        if rule == "rank":
            stop = (blocks.double() * threshold).long()
        else:
            stop = (share <= threshold + 1e-6).sum(-1, keepdim=True) + int(inclusive)
        if factor == 1 and least:
            stop = torch.maximum(stop, (blocks.double() * least).long() + 1)
        length = (stop - start).clamp_min(0)
        stop = torch.minimum(start + length + -length % multiple, blocks)
        full = start + (stop - start) // multiple * multiple
        stop = torch.where(stop == blocks, full, stop)
        ranked = torch.where((rank >= start) & (rank < stop), factor, ranked)
        start = stop
    factors = torch.zeros_like(order).scatter(-1, order, ranked)
    return factors.masked_fill(~allowed, 0)


def similarity_cap(k: Tensor, real: Tensor, block: int, thresholds: Sequence[float]) -> Tensor:
    """The greatest factor f whose groups are alike inside each block of keys, (B,H_k,nk).

    k (B,H_k,nk*block,D), real (B or 1, nk*block). Groups of f keys are judged by the mean cosine of
    their first and last key, against one threshold for each factor above 1.
    """
    unit = F.normalize(k, dim=-1).unflatten(2, (-1, block))  # (B,H_k,nk,block,D)
    there = real.unflatten(1, (-1, block))[:, None]
    cap = torch.ones(unit.shape[:3], dtype=torch.long, device=k.device)
    for factor, threshold in zip(FACTORS[1:], thresholds, strict=True):
        first, last = slice(0, None, factor), slice(factor - 1, None, factor)
        both = there[..., first] & there[..., last]
        cosine = (unit[..., first, :] * unit[..., last, :]).sum(-1)
        mean = cosine.masked_fill(~both, 0.0).sum(-1) / both.sum(-1).clamp_min(1)
        cap = torch.where(mean > threshold, factor, cap)
    return cap
