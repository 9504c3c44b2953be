r"""Gathered executor: the few keys of each query are copied side by side, so that the cost is that
of the visible pairs, wherever in the sequence they lie.

    o_i = sum_{c : inside_ic} softmax_c(q_i . k_{keys_ic} s) v_{keys_ic}

q: (B,H,N,D)  k: (B,H_k,M,D)  v: (B,H_v,M,E)  keys, inside: (N,w). Memory is that of N w keys and
values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.call import Call, Result
from regard.core.scored import without_padding
from regard.core.weights import Softmax, normalised, scale_of


def attend_gathered(
    q: Tensor, k: Tensor, v: Tensor, call: Call, keys: Tensor, inside: Tensor
) -> Result:
    """Softmax attention of row i over the key rows keys[i] (indices) where inside[i] is True, and
    where the call's mask and padding allow.
    """
    q, k, v = without_padding(q, k, v, call)
    visible, others = inside, call.visibility()
    if others is not None:
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
        heads = torch.arange(q.shape[1], device=q.device)[:, None, None]
        rows = torch.arange(q.shape[2], device=q.device)[:, None]
        visible = visible & others.visible(call.frame(q, k).at(batch, heads, rows, keys))
    scores = _per_row(q, k[:, :, keys].transpose(-1, -2)) * scale_of(call, None, q.shape[-1])
    weights, _ = normalised(scores, visible, Softmax(), need_lse=False)
    out = _per_row(weights, v[:, :, keys])
    if call.query_padding is not None:
        out = out.masked_fill(~call.query_padding[:, None, :, None], 0.0)
    return Result(out)


def _per_row(x: Tensor, y: Tensor) -> Tensor:
    """x (B,H,N,a) times the matrix of its row in y (B,H_y,N,a,b) -> (B,H,N,b)."""
    group = x.shape[1] // y.shape[1]
    folded = x.unflatten(1, (y.shape[1], group)).transpose(2, 3)  # (B, H_y, N, group, a)
    return (folded @ y).transpose(2, 3).flatten(1, 2)
