r"""Observed attention: what the queries at hand give each key.

    A = softmax(q k^T s) over what each query may see        (…, queries, M)

Heads that share keys speak with one voice, the mean of theirs. What all queries of a long call give
is summed block by block of queries, so that the matrix of weights is never whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.cutting import picked
from regard.core.model_scores import finished
from regard.core.moment import Held
from regard.core.unit import WORKSPACE
from regard.core.weights import Softmax, group_scores

COPIES = 6
"""Tensors of the size of a block's weights that are alive at a time, at most."""


def last_queries(held: Held, last: int) -> tuple[Tensor, Tensor]:
    """Indices (B,w) of each sequence's last `last` real queries, in order, and which of them there
    are (B,w): a sequence may be shorter.
    """
    order = torch.where(held.query_real, held.query_positions, -1)
    found = order.topk(min(last, order.shape[-1]), dim=-1).indices.flip(-1)
    return found, held.query_real.gather(1, found)


def observed_weights(held: Held, last: int) -> Tensor:
    """Weights (B,g,w,M) that the last `last` real queries give each key, averaged over the query
    heads of a group; rows of queries that do not exist are zero.
    """
    index, there = last_queries(held, last)
    weights, _ = _weights(held, index, there)
    return weights.unflatten(1, (held.k.shape[1], -1)).mean(2)


def mass_and_viewers(held: Held, workspace: int = WORKSPACE) -> tuple[Tensor, Tensor]:
    """What all real queries of this call give each key, averaged over the query heads of a group,
    and how many of them see it: (B,g,M) each, in at least float32. No more than `workspace` bytes
    are held meanwhile, or one row of weights.
    """
    batch, heads, n = held.q.shape[:3]
    groups, m = held.k.shape[1:3]
    dtype = torch.promote_types(held.q.dtype, torch.float32)
    mass, viewers = (held.q.new_zeros(batch, groups, m, dtype=dtype) for _ in range(2))
    rows = max(1, workspace // max(1, COPIES * batch * heads * m * dtype.itemsize))
    for start in range(0, n, rows):
        block = slice(start, start + rows)
        weights, seen = _weights(held, block, held.query_real[:, block])
        mass += weights.sum(-2, dtype=dtype).unflatten(1, (groups, -1)).mean(2)
        viewers += seen[:, :: heads // groups].sum(-2)
    return mass, viewers


def _weights(held: Held, rows: Tensor | slice, there: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (B,h,w,M) of some rows, given by their indices (B,w) or as a slice, and what they
    see; a row that is not there (B,w) sees nothing.
    """
    heads, groups = held.q.shape[1], held.k.shape[1]
    scores = group_scores(picked(held.q, rows, len(held.q)), held.k) * held.scale
    bias = None if held.bias is None else picked(held.bias, rows, len(held.q))
    scores = finished(scores, held.softcap, bias)
    seen = there[:, None, :, None] & held.real.repeat_interleave(heads // groups, 1)[:, :, None]
    visible = held.sees(rows)
    if visible is not None:
        seen = seen & visible
    return Softmax()(scores, seen, seen.sum(-1, keepdim=True)), seen


def ranked(scores: Tensor, count: Tensor) -> Tensor:
    """Boolean (B,g,M): the `count` (B,) highest scores of each row, ties to the earlier key;
    negative scores never.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    return (rank < count[:, None, None]) & (scores >= 0)
