"""Ahead: how far a query may look into the future."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.core.blocks import Tiles
from regard.core.errors import ArgumentError
from regard.core.frame import Pairs
from regard.core.mask import Mask


@dataclass(frozen=True)
class Ahead(Mask):
    """key - query <= size, in absolute positions; Ahead(0) is causal."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ArgumentError("Ahead.size", "at least 0", self.size)

    def visible(self, pairs: Pairs) -> Tensor:
        return pairs.key - pairs.query <= self.size

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        some = tiles.key_low - tiles.query_high <= self.size
        return some, tiles.key_high - tiles.query_low <= self.size
