r"""Query blocks: queries that choose their keys together, `size` consecutive positions to a block.

    block of query i = floor(p_i / size)        p_i: its position, whatever stands beside it

Blocks are cut by position, so padding on either side, a cache, and chunks of a prompt change
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class QueryBlocks:
    """Which queries stand in which of T blocks of `size`.

    rows (B,T*size): the query at each place; there: whether there is one. slots (B,N): the place
    of each query; real (B,N): False on padding.
    """

    rows: Tensor
    there: Tensor
    slots: Tensor
    real: Tensor
    size: int

    def cut(self, x: Tensor) -> Tensor:
        """x (B,H,N,D) by blocks, (B,H,T,size,D); zeros where there is no query."""
        index = self.rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        laid = x.gather(2, index).masked_fill(~self.there[:, None, :, None], 0.0)
        return laid.unflatten(2, (-1, self.size))

    def spread(self, x: Tensor) -> Tensor:
        """What holds for blocks (B,h,T,M), for each of their queries: (B,h,N,M)."""
        block = (self.slots // self.size)[:, None, :, None]
        return x.gather(2, block.expand(-1, x.shape[1], -1, x.shape[3]))

    def back(self, x: Tensor) -> Tensor:
        """Undo `cut`: x (B,H,T*size,E) to (B,H,N,E), zeros on padding."""
        index = self.slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, index).masked_fill(~self.real[:, None, :, None], 0.0)

    def last_rows(self, x: Tensor) -> Tensor:
        """Rows x (B,N,M) of queries: that of the last query of each block, (B,T,M)."""
        place = torch.arange(self.rows.shape[1], device=x.device).expand_as(self.rows)
        last = self.greatest_of(place.masked_fill(~self.there, 0))
        index = self.rows.gather(1, last)
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))

    def greatest_of(self, places: Tensor) -> Tensor:
        """Greatest of numbers of places (B,T*size) in each block, (B,T)."""
        return places.unflatten(1, (-1, self.size)).amax(-1)

    def greatest(self, x: Tensor, empty: int) -> Tensor:
        """Greatest of numbers x (B,N) in each block, (B,T); `empty` where there is no query."""
        return self.greatest_of(x.gather(1, self.rows).masked_fill(~self.there, empty))

    def counts(self) -> Tensor:
        """Queries of each block, (B,T)."""
        return self.there.unflatten(1, (-1, self.size)).sum(-1)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of x (B,H,N,D) over the queries of each block, (B,H,T,D)."""
        return self.cut(x).sum(3) / self.counts().clamp_min(1)[:, None, :, None]


def query_blocks(positions: Tensor, real: Tensor | None, size: int) -> QueryBlocks:
    """Blocks of queries at consecutive positions (B,N); real (B,N) is False on padding."""
    batch, n = positions.shape
    if real is None:
        real = torch.ones_like(positions, dtype=torch.bool)
    places = torch.arange(n, device=positions.device).expand(batch, -1)
    if size == 1 or n == 0:
        return QueryBlocks(places, real, places, real, size)
    room = (n + 2 * size - 2) // size * size  # so many blocks n consecutive positions may touch
    least = positions.masked_fill(~real, torch.iinfo(positions.dtype).max).amin(1, keepdim=True)
    slots = positions - least.div(size, rounding_mode="floor") * size
    slots = torch.where(real, slots, room)
    rows = places.new_full((batch, room + 1), -1).scatter(1, slots, places)[:, :-1]
    there = rows >= 0
    return QueryBlocks(rows.clamp_min(0), there, slots.clamp_max(room - 1), real, size)
