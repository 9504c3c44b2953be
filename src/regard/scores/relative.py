r"""Relative scores: what a query makes of the distance to a key, from a table of R rows.

    s_ij -> s_ij + u_i,r(i,j)       r(i,j) = p_j - p_i + reach - 1       u: (B,H,N,R)  s: (B,H,N,M)

p are absolute positions; rows 0 … reach-1 hold the distances reach-1 … 0 to keys at or before the
query, further rows (a two-sided table has 2·reach-1) keys after it; beyond the table nothing is
added. `relative` looks each pair up, at any positions. Where positions are consecutive, the same
numbers only have to be shifted, row by row: `skew` does so by a reshape, `unskew` undoes it.
"""

from __future__ import annotations

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

    def bias(q: Tensor, pairs: Pairs) -> tuple[int, Tensor]:
        n, m, rows = q.shape[-2], pairs.key.shape[-1], table.shape[-2]
        own = table if table.ndim == 2 else table[pairs.h[..., 0, 0]]  # (…,h,R,D)
        lead = _lead(pairs)
        if lead is None:
            row, near = relative_rows(pairs, reach, rows)
            by_row = q @ (own * scale).mT
            found = by_row.gather(-1, row.expand(*q.shape[:-1], m))
            return 0, found.masked_fill(~near, 0.0)
        first = min(max(1 - reach - lead, 0), m)
        width = max(min(rows - reach + n - lead, m) - first, 0)
        if not width:
            return first, q.new_zeros(*q.shape[:-1], 0)
        low = lead + first - n + reach  # row of the last query and the first key
        start, stop = max(low, 0), min(low + n + width, rows)
        by_row = q @ (own[..., start:stop, :] * scale).mT
        return first, skew(F.pad(by_row, (start - low, low + n + width - stop)), width)

    return bias


def _lead(pairs: Pairs) -> int | None:
    """How far the first key lies behind the first query, where that is the same everywhere and both
    positions rise by one.
    """
    query, key = pairs.query, pairs.key
    if query.ndim < 2 or query.shape[-1] != 1 or (key.ndim > 1 and key.shape[-2] != 1):
        return None
    if 0 in (query.shape[-2], key.shape[-1]):
        return None
    leads = key[..., :1] - query[..., :1, :]
    steady = (query.diff(dim=-2) == 1).all() & (key.diff(dim=-1) == 1).all()
    lead = int(leads.flatten()[0])
    return lead if bool(steady & (leads == lead).all()) else None


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
