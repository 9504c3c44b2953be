r"""Elastic: a causal window that grows with the sequence, in whole blocks, and the first blocks.

    band(N) = max(1, floor(floor(alpha / block) + beta ceil(N / block)))
    visible = key <= query  and  (query // block - key // block < band  or  key // block < sinks)

N is the sequence's own length, so each row of a padded batch has its own band.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from regard.core.blocks import Tiles
from regard.core.errors import ArgumentError
from regard.core.frame import Pairs
from regard.core.mask import Mask


@dataclass(frozen=True)
class Elastic(Mask):
    """alpha: tokens, below 0 for a window that opens late. beta: share of the sequence. block:
    tokens per block. sinks: first blocks that stay visible.
    """

    alpha: float
    beta: float
    block: int = 64
    sinks: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and math.isfinite(self.beta)):
            raise ArgumentError("alpha, beta", "finite numbers", (self.alpha, self.beta))
        if self.block < 1 or self.sinks < 0:
            raise ArgumentError("block, sinks", "block >= 1, sinks >= 0", (self.block, self.sinks))

    def band(self, length: Tensor) -> Tensor:
        """Blocks a query sees, its own included, in sequences of these lengths."""
        blocks = (length + self.block - 1) // self.block
        return (self.alpha // self.block + self.beta * blocks.double()).floor().long().clamp_min(1)

    def visible(self, pairs: Pairs) -> Tensor:
        row, column = pairs.query // self.block, pairs.key // self.block
        near = row - column < self.band(pairs.length)
        return (near | (column < self.sinks)) & (pairs.key <= pairs.query)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        top, bottom = tiles.query_low // self.block, tiles.query_high // self.block
        left, right = tiles.key_low // self.block, tiles.key_high // self.block
        band = self.band(tiles.frame.lengths)[:, None, None, None]
        some = (top - right < band) | (left < self.sinks)
        full = (bottom - left < band) | (right < self.sinks)
        causal = tiles.key_low <= tiles.query_high, tiles.key_high <= tiles.query_low
        return some & causal[0], full & causal[1]
