"""Choices by position: which tokens were chosen, told in a way that any layer understands, however
its cache is laid out.

A layer may hold other keys than its neighbour (a window, evictions, padding); a token's position is
the same in all of them.
"""

from __future__ import annotations

from torch import Tensor

from regard.core.moment import Moment


def by_position(chosen: Tensor, at: Moment) -> Tensor:
    """Chosen keys (B,h,N,M), all of them visible ones, as booleans (B,h,N,T) by position."""
    return sums_by_position(chosen.int(), at) > 0


def sums_by_position(x: Tensor, at: Moment) -> Tensor:
    """Numbers of keys (B,h,N,M), zero on padding (which repeats a position), by position: (B,h,N,T)
    with T the length of the longest sequence.
    """
    width = int(at.length.amax()) if at.length.numel() else 0
    place = _places(x.shape[1], x.shape[2], at)
    return x.new_zeros(*x.shape[:3], width).scatter_add_(-1, place, x)


def at_positions(table: Tensor, at: Moment) -> Tensor:
    """What a table (B,h,N,T) by position says of each key of a moment, (B,h,N,M)."""
    return table.gather(-1, _places(table.shape[1], table.shape[2], at))


def _places(heads: int, n: int, at: Moment) -> Tensor:
    """Positions of the keys, (B,heads,N,M)."""
    positions = at.key_positions
    if positions.shape[1] > 1:
        positions = positions.repeat_interleave(heads // positions.shape[1], 1)
    return positions[:, :, None].expand(-1, heads, n, -1)
