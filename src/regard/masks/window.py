"""Window: a query sees keys less than `size` positions away; with Causal, exactly the last `size`
keys, its own included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.blocks import Tiles
from regard.core.errors import ArgumentError
from regard.core.frame import Pairs
from regard.core.mask import Mask


@dataclass(frozen=True)
class Window(Mask):
    """|query - key| < size, in absolute positions."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ArgumentError("Window.size", "at least 1", self.size)

    def visible(self, pairs: Pairs) -> Tensor:
        return (pairs.query - pairs.key).abs() < self.size

    def alive(self, pairs: Pairs) -> Tensor:
        return pairs.key > pairs.query - self.size

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        nearest = torch.maximum(tiles.query_low - tiles.key_high, tiles.key_low - tiles.query_high)
        farthest = torch.maximum(tiles.query_high - tiles.key_low, tiles.key_high - tiles.query_low)
        return nearest < self.size, farthest < self.size

    @property
    def by_distance(self) -> bool:
        return True
