r"""Narrowing: one query per head that sees few of many keys reads those alone.

    W_g = keys that some query head of key head g sees        k, v, masks: their columns W_g

A treatment says which keys stay visible, and this makes it as fast as few keys are; the softmax is
the same. Rows that see fewer keys than others of the batch are filled up with hidden ones.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from regard.core.moment import Moment
from regard.core.rows import take_rows

FEW = 2
"""Keys are copied where at most one in this many is wanted."""


def narrowed(at: Moment) -> Moment:
    """The same moment with hidden keys left out, where that pays; else as it is."""
    if at.visible is None or at.q.shape[2] != 1:
        return at
    wanted = at.visible.expand(len(at.q), -1, -1, -1)[:, :, 0]
    if wanted.shape[1] > 1:
        wanted = wanted.unflatten(1, (at.k.shape[1], at.group)).any(2)
    most = int(wanted.sum(-1).amax()) if wanted.numel() else 0
    if most == 0 or most * FEW > at.k.shape[2]:
        return at
    index = wanted.byte().topk(most, sorted=False).indices  # (B, h_k or 1, w)
    columns = _columns(at.visible, index, at.q.shape[1])
    every = index.expand(-1, at.k.shape[1], -1)
    return replace(
        at,
        k=take_rows(at.k, every[:, :, None])[:, :, 0],
        v=take_rows(at.v, every[:, :, None])[:, :, 0],
        key_positions=_columns(at.key_positions, index, at.k.shape[1]),
        real=_columns(at.real, index, at.k.shape[1]),
        sight=lambda: columns,
        bias=None if at.bias is None else _columns(at.bias, index, at.q.shape[1]),
        call=None,
    )


def _columns(x: Tensor, index: Tensor, heads: int) -> Tensor:
    """Columns `index` (B,g,w) of x (B or 1, h or 1[, N], M), for `heads` heads in g groups."""
    heads = x.shape[1] if index.shape[1] == 1 else heads
    index = index.repeat_interleave(heads // index.shape[1], 1)
    if x.ndim == 4:
        index = index[:, :, None].expand(-1, -1, x.shape[2], -1)
    return x.expand(*index.shape[:2], *x.shape[2:]).gather(-1, index)
