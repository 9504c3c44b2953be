"""Blocks: whole blocks of keys are visible to whole blocks of queries, as a boolean map says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.blocks import Tiles
from regard.core.errors import ArgumentError
from regard.core.frame import Pairs
from regard.core.mask import Mask


@dataclass(frozen=True, eq=False)
class Blocks(Mask):
    """map[b, h, query // size, key // size], in absolute positions: (B or 1, H or 1, nq, nk).

    Positions beyond the map are invisible.
    """

    map: Tensor
    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ArgumentError("Blocks.size", "at least 1", self.size)
        if self.map.dtype != torch.bool or self.map.ndim != 4:
            got = (self.map.dtype, tuple(self.map.shape))
            raise ArgumentError("Blocks.map", "a boolean tensor (B or 1, H or 1, nq, nk)", got)

    def visible(self, pairs: Pairs) -> Tensor:
        chart = F.pad(self.map, (0, 1, 0, 1))  # the last row and column: whatever lies beyond
        row, column = (
            torch.where(x < 0, beyond, (x // self.size).clamp(0, beyond))
            for x, beyond in zip((pairs.query, pairs.key), self.map.shape[2:], strict=True)
        )
        b = pairs.b if chart.shape[0] > 1 else torch.zeros_like(pairs.b)
        h = pairs.h if chart.shape[1] > 1 else torch.zeros_like(pairs.h)
        return chart[b, h, row, column]

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """Exact for the rectangle of positions of each tile, by sums over rectangles of the map."""
        sums = F.pad(self.map.long().cumsum(2).cumsum(3), (1, 0, 1, 0))
        rows, columns = self.map.shape[2:]
        top, left = tiles.query_low // self.size, tiles.key_low // self.size
        bottom, right = tiles.query_high // self.size + 1, tiles.key_high // self.size + 1
        area = (bottom - top) * (right - left)
        b = torch.arange(sums.shape[0], device=sums.device)[:, None, None, None]
        h = torch.arange(sums.shape[1], device=sums.device)[:, None, None]

        def corner(row: Tensor, column: Tensor) -> Tensor:
            return sums[b, h, row.clamp(0, rows), column.clamp(0, columns)]

        held = corner(bottom, right) - corner(top, right) - corner(bottom, left)
        held = held + corner(top, left)
        return held > 0, held == area
