r"""Influence: what the loss gains when a query loses one key and the others are weighed anew.

    E_ij = A_ij / (1 - A_ij) (sum_n A_in G_in - G_ij)        A: weights, G = dL/dA, both (…,N,M)

To first order in the change of the row. An only key leaves nothing to weigh: E_ij = -A_ij G_ij.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def influence(weights: Tensor, gradients: Tensor) -> Tensor:
    """E (…,N,M) of the weights (…,N,M) of softmax and the loss's gradients by them."""
    product = weights * gradients
    others = 1 - weights
    alone = others <= torch.finfo(weights.dtype).eps
    change = weights * (product.sum(-1, keepdim=True) - gradients)
    return torch.where(alone, -product, change / others.masked_fill(alone, 1.0))


def block_influence(effect: Tensor, block: int) -> Tensor:
    """Sum of |E| over square blocks: (…,N,M) -> (…, ceil(N / block), ceil(M / block))."""
    n, m = effect.shape[-2:]
    padded = F.pad(effect.abs(), (0, -m % block, 0, -n % block))
    return padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).sum((-1, -3))
