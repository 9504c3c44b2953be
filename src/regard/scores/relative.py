r"""Relative scores: what a query makes of the distance to a key, from a table of R rows.

    s_ij -> s_ij + u_i,r(i,j)       r(i,j) = p_j - p_i + reach - 1       u: (B,H,N,R)  s: (B,H,N,M)

p are absolute positions; rows 0 … reach-1 hold the distances reach-1 … 0 to keys at or before the
query, further rows (a two-sided table has 2·reach-1) keys after it; beyond the table nothing is
added. `relative` looks each pair up, at any positions. Where positions are consecutive, the same
numbers only have to be shifted, row by row: `skew` does so by a reshape, `unskew` undoes it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.frame import Frame, Pairs
from regard.core.weights import BlockBias, ScoreMod


def relative_rows(pairs: Pairs, reach: int, rows: int) -> tuple[Tensor, Tensor]:
    """The table row of each pair, and whether the table has it; both broadcast to (B,H,N,M)."""
    row = pairs.key - pairs.query + (reach - 1)
    return row.clamp(0, rows - 1), (row >= 0) & (row < rows)


def relative(by_row: Tensor, frame: Frame, reach: int) -> ScoreMod:
    """The score modification for scores by_row (B,H,N,R) of each query with each table row."""

    def add(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        row, near = relative_rows(frame.at(b, h, q_idx, kv_idx), reach, by_row.shape[-1])
        return score + by_row[b, h, q_idx, row].masked_fill(~near, 0.0)

    return add


def relative_bias(table: Tensor, reach: int, scale: float) -> BlockBias:
    """The same numbers for one block of queries after another, so that (B,H,N,R) is never held.

    table: (R,D) or (H,R,D). Only the rows that a block needs meet its queries; where positions are
    consecutive, their products are shifted into place, elsewhere looked up.
    """

    def bias(q: Tensor, pairs: Pairs) -> Tensor:
        n, rows = q.shape[-2], table.shape[-2]
        row = pairs.key - pairs.query + (reach - 1)
        m = row.shape[-1]
        if row.shape[-2] != n or 0 in (n, m):
            return q.new_zeros(*q.shape[:-1], m)
        first = int(row.min())
        used = table if table.ndim == 2 else table[pairs.h.flatten()]
        used = used[..., max(first, 0) : max(int(row.max()) + 1, 0), :]
        if used.ndim == 3:
            used = used.view(used.shape[0], *(1,) * (q.ndim - 4), *used.shape[1:])
        if _consecutive(row):
            edges = (0, 0, max(-first, 0), n + m - max(-first, 0) - used.shape[-2])
            return skew(q @ F.pad(used, edges).mT * scale, m)
        by_row = q @ used.mT * scale
        near = (row >= 0) & (row < rows)
        place = (row - max(first, 0)).clamp(0, max(used.shape[-2] - 1, 0))
        if not used.shape[-2]:
            return by_row.new_zeros(*q.shape[:-1], m)
        return by_row.gather(-1, place.expand(*q.shape[:-1], m)).masked_fill(~near, 0.0)

    return bias


def _consecutive(row: Tensor) -> bool:
    """Whether the table row falls by one per query and rises by one per key."""
    n, m = row.shape[-2:]
    steps = torch.arange(m, device=row.device) - torch.arange(n, device=row.device)[:, None]
    return bool((row - row[..., :1, :1] == steps).all())


def consecutive_rows(table: Tensor, reach: int, n: int, m: int) -> Tensor:
    """The rows that the last n of m consecutive positions need, (…,R,D) -> (…,n+m,D), in the order
    in which `skew` reads them; rows that the table does not have are zero.
    """
    return F.pad(table, (0, 0, m - reach, n + reach - table.shape[-2]))


def skew(by_row: Tensor, m: int) -> Tensor:
    """(…,N,N+M) with column N-1+d for key offset d -> (…,N,M): row i moves i places to the left."""
    n, width = by_row.shape[-2:]
    shifted = by_row.flatten(-2)[..., n - 1 : n - 1 + n * (width - 1)] if n else by_row.flatten(-2)
    return shifted.unflatten(-1, (n, width - 1))[..., :m] if n else by_row[..., :m]


def unskew(by_key: Tensor) -> Tensor:
    """(…,N,M) -> (…,N,N+M): the adjoint of `skew`."""
    n, m = by_key.shape[-2:]
    padded = F.pad(by_key, (0, n - 1)).flatten(-2) if n else by_key.flatten(-2)
    return F.pad(padded, (n - 1, 1)).unflatten(-1, (n, n + m)) if n else F.pad(by_key, (0, n))
