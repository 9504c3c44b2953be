r"""Rows of heads: chosen keys or values of (B,H,M,D), copied side by side or summed where they lie.

All heads are one table of rows, and a row is named by its number in it; a cache that has room
behind each head is one too, so that nothing is copied but what was chosen.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

SPLIT = 4096
"""Most rows summed by one thread at a time: enough that to start costs nothing."""
LIST = 2**18
"""Most rows named in one list, so that the list stays in the cache."""


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B,H_x,M,D) at index (B,H,T,w) -> (B,H,T,w,D); H is a multiple of H_x."""
    table, apart = _table(x)
    b, h = index.shape[:2]
    first = torch.arange(b * x.shape[1], device=x.device) * apart
    first = first.view(b, -1, 1).expand(-1, -1, h // x.shape[1]).reshape(b, h, 1, 1)
    return F.embedding(index + first, table)


def key_products(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """q (B,H,N,D) · k (B,H_k,M,D)[…,rows,:] for rows (B,H,w) -> (B,H,N,w); the chosen keys of one
    head at a time are copied.
    """
    (b, h, n, _), heads = q.shape, k.shape[1]
    table, apart = _table(k)
    products = [
        F.embedding(rows[i, j] + (i * heads + j * heads // h) * apart, table) @ q[i, j].mT
        for i, j in product(range(b), range(h))
    ]
    return torch.stack(products).reshape(b, h, -1, n).mT


def value_sums(weights: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """sum_w weights[…,w] v[…,rows[…,w],:] for weights (B,H,N,W), v (B,H_v,M,E) and rows (B or 1, H
    or 1, N or 1, W), int32 or int64 -> (B,H,N,E). Splits of W are shared out among the threads.
    """
    b, h, n, w = weights.shape
    heads, m, e = v.shape[1:]
    if weights.numel() == 0:
        return weights.sum(-1, keepdim=True) * v.new_zeros(e)
    r = h // heads * n  # rows of weights per head of v
    size = min(SPLIT, -(-w // torch.get_num_threads()))
    several = max(
        g for g in range(1, heads + 1) if heads % g == 0 and g * r * w <= max(r * w, LIST)
    )
    if rows.shape[1:3] == (1, 1):
        rows = rows.expand(-1, -1, r, -1)
    else:
        rows = rows.expand(-1, h, n, -1).reshape(-1, heads, r, w)
    table, apart = _table(v)
    laid = _by_split(weights.reshape(b, heads, r, w), size).reshape(b, heads // several, -1)
    index = _listed(_by_split(rows, size), several, apart).expand(b, heads // several, -1)
    starts = torch.tensor(_starts(w, r, size, several), dtype=index.dtype, device=v.device)
    sums = []
    for i, j in product(range(b), range(heads // several)):
        first = (i * heads + j * several) * apart
        part = table[first : first + (several - 1) * apart + m]
        sums.append(
            F.embedding_bag(index[i, j], part, starts, mode="sum", per_sample_weights=laid[i, j])
        )
    return torch.stack(sums).reshape(b, heads, -1, r, e).sum(2).reshape(b, h, n, e)


def _table(x: Tensor) -> tuple[Tensor, int]:
    """x (B,H,M,D) as rows (R,D), and how many of them one head stands behind the other."""
    b, h, m, d = x.shape
    apart = x.stride(1) // max(d, 1)
    if apart > m > 0 and x.stride() == (h * x.stride(1), apart * d, d, 1):  # room behind each head
        return x.as_strided(((b * h - 1) * apart + m, d), (d, 1)), apart
    return x.reshape(-1, d), m


def _by_split(x: Tensor, size: int) -> Tensor:
    """(…,r,W) -> (…,r*W): the r pieces of a split follow each other, so that they find its values
    in the cache; the last split may be shorter.
    """
    if x.shape[-2] == 1:
        return x.flatten(-2)
    even = x.shape[-1] - x.shape[-1] % size
    pieces = x[..., :even].unflatten(-1, (-1, size)).transpose(-3, -2).flatten(-3)
    return torch.cat([pieces, x[..., even:].flatten(-2)], -1)


def _listed(rows: Tensor, several: int, apart: int) -> Tensor:
    """Rows (B or 1, H_v or 1, L) of single heads as lists for `several` heads at a time, each
    `apart` rows behind the last: (B or 1, H_v // several or 1, several * L).
    """
    rows = rows[:, :, None] if rows.shape[1] == 1 else rows.unflatten(1, (-1, several))
    offsets = torch.arange(several, dtype=rows.dtype, device=rows.device) * apart
    return (rows + offsets[:, None]).flatten(2)


def _starts(w: int, r: int, size: int, several: int) -> list[int]:
    """Where each split of each row of each head begins in the list."""
    even = w - w % size
    starts = [*range(0, even * r, size), *range(even * r, w * r, w - even or 1)]
    return [head * r * w + start for head in range(several) for start in starts]
