r"""Recency: the first keys and the newest ones, judged by positions alone.

near_ij = i - j < recent  or  j < first        i: a query's position, j: a key's
"""

from __future__ import annotations

from torch import Tensor

from regard.core.moment import Held, Moment


def near_or_first(queries: Tensor, keys: Tensor, recent: int | Tensor, first: int) -> Tensor:
    """Boolean (B,g,N,M) for positions of queries (B,N) and of keys (B,g,M); recent: a number, or
    one per sequence (B,).
    """
    if isinstance(recent, Tensor):
        recent = recent[:, None, None, None]
    distance = queries[:, None, :, None] - keys[:, :, None]
    return (distance < recent) | (keys < first)[:, :, None]


def seen_near(at: Moment, recent: int | Tensor, first: int) -> Tensor:
    """What each query of a moment sees of the keys that are left, (B,h or 1,N,M)."""
    near = near_or_first(at.query_positions, at.key_positions, recent, first)
    return near if near.shape[1] == 1 else near.repeat_interleave(at.group, dim=1)


def kept_near(held: Held, recent: int | Tensor, first: int) -> Tensor:
    """The keys (B,g,M) that the next query will see; it counts among the `recent` itself."""
    return near_or_first(held.length[:, None], held.positions, recent, first)[:, :, 0]
