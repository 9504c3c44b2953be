r"""Keys in sequence order: what methods on blocks, groups and clusters count by.

    rank_j = number of real keys before key j        padding comes last, on whichever side it stood

Blocks cut by rank are the same blocks with left padding, right padding, a cache, or none of these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.padding import Alignment


@dataclass(frozen=True, eq=False)
class Sequence:
    """The keys of each row by position.

    alignment: moves keys (…,M,D) into that order. queries (B or 1, N), keys (B or 1, M): positions,
    those of padded keys beyond any query. reach (B or 1, N): real keys at or before each query.
    """

    alignment: Alignment
    queries: Tensor
    keys: Tensor
    reach: Tensor


def in_sequence(call: Call, q: Tensor, k: Tensor) -> Sequence:
    """The order of the keys of a call with queries q (B,H,N,D) and keys k (B,H_k,M,D)."""
    queries, keys = call.positions(q.shape[2], k.shape[2], q.device)
    real = torch.ones_like(keys, dtype=torch.bool) if call.padding is None else call.padding
    keys = torch.where(real, keys, torch.iinfo(keys.dtype).max)
    keys, order = keys.sort(dim=-1, stable=True)
    rows = max(keys.shape[0], queries.shape[0])
    reach = torch.searchsorted(
        keys.expand(rows, -1).contiguous(), queries.expand(rows, -1).contiguous(), right=True
    )
    alignment = Alignment(order, real.expand_as(order).gather(-1, order))
    return Sequence(alignment, queries, keys, reach)
