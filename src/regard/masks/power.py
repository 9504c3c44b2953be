r"""PowerReach: a query sees near blocks, the first blocks, and blocks at distances 1, 2, 4, 8, …

    r = query // block - key // block        visible: key <= query, and r < window or r a power of
    two or key < sinks * block

After d layers information has crossed 2^d blocks, at about log2(N / block) blocks per query.
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
class PowerReach(Mask):
    """Never shows the future. window and sinks count blocks, the query's own block included.

    Every key stays alive: some later query is a power of two away from it.
    """

    block: int = 256
    window: int = 5
    sinks: int = 1

    def __post_init__(self) -> None:
        if self.block < 1 or self.window < 1 or self.sinks < 0:
            raise ArgumentError(
                "PowerReach", "block and window of at least 1, sinks of at least 0", self
            )

    def visible(self, pairs: Pairs) -> Tensor:
        distance = pairs.query // self.block - pairs.key // self.block
        power = (distance & (distance - 1)) == 0  # distance 0 counts
        reached = (distance < self.window) | power | (pairs.key < self.sinks * self.block)
        return (pairs.key <= pairs.query) & reached

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        least = tiles.query_low // self.block - tiles.key_high // self.block
        most = tiles.query_high // self.block - tiles.key_low // self.block
        first = self.sinks * self.block
        near = (least < self.window) | (_highest_power(most) >= least) | (tiles.key_low < first)
        some = (tiles.key_low <= tiles.query_high) & near
        power = (least == most) & ((least & (least - 1)) == 0)
        full = (most < self.window) | power | (tiles.key_high < first)
        return some, full & (tiles.key_high <= tiles.query_low)


def _highest_power(count: Tensor) -> Tensor:
    """The greatest power of two within each count (at least 1)."""
    exponent = torch.frexp(count.clamp_min(1).double()).exponent
    return torch.ones_like(count) << (exponent - 1)
