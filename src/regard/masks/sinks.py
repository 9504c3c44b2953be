"""Sinks: the first `count` positions stay visible to every later query (never to an earlier one, so
no future leaks).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.core.blocks import Tiles
from regard.core.errors import ArgumentError
from regard.core.frame import Pairs
from regard.core.mask import Mask


@dataclass(frozen=True)
class Sinks(Mask):
    """key < count and key <= query. Its second half makes `Causal() & Window(w) | Sinks(s)` causal
    as it reads.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ArgumentError("Sinks.count", "0 or more", self.count)

    def visible(self, pairs: Pairs) -> Tensor:
        return (pairs.key < self.count) & (pairs.key <= pairs.query)

    def alive(self, pairs: Pairs) -> Tensor:
        return (pairs.key < self.count).expand_as(pairs.query + pairs.key)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        some = (tiles.key_low < self.count) & (tiles.key_low <= tiles.query_high)
        return some, (tiles.key_high < self.count) & (tiles.key_high <= tiles.query_low)
