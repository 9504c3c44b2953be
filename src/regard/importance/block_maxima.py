r"""Block maxima: the largest weight that softmax attention gives a pair in each block, what a block
gate learns to predict.

    T_ab = max_{i in a, j in b} A_ij / sum_b of the same        A = softmax(q k^T s), causal
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.weights import Softmax, group_scores


def block_maxima(q: Tensor, k: Tensor, real: Tensor, block: int, scale: float) -> Tensor:
    """T (B,H,n,n) of q (B,H,n*block,D), k (B,H_k,n*block,D) in sequence order, of which `real`
    (B or 1, ·) count; a row without any gives zeros. One row of blocks is computed at a time.
    """
    place = torch.arange(k.shape[2], device=q.device)
    rows = []
    for start in range(0, q.shape[2], block):
        own = slice(start, start + block)
        visible = real[:, None, None] & real[:, None, own, None] & (place <= place[own, None])
        scores = group_scores(q[:, :, own], k) * scale
        weights = Softmax()(scores, visible, visible.sum(-1, keepdim=True))
        rows.append(weights.unflatten(-1, (-1, block)).amax((2, 4)))
    found = torch.stack(rows, 2)
    return found / found.sum(-1, keepdim=True).clamp_min(torch.finfo(found.dtype).tiny)
