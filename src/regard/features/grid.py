r"""The token grid as an image, and as rectangular tiles of it.

    tokens (B, prefix + h*w, C)  <->  image (B, C, h, w)
    tokens (B, h*w, C)           <->  tiles (B, T, area, C)

Cells stand row by row after `prefix` tokens; tiles stand row by row too, and so do the cells of a
tile. Where tiles do not divide the grid, cells are added below and to the right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.boundary import grid_of, refuse
from regard.core.call import Call
from regard.core.errors import ArgumentError, UnsupportedError

Sides = tuple[int, int]


def image_sides(call: Call, tokens: int, who: str) -> Sides:
    """(h, w) of the call's grid, for a layer that takes neither masks nor prefix tokens."""
    refuse(call, who, "mask")
    if call.prefix:
        raise UnsupportedError(who, f"it has no place for call.prefix={call.prefix} tokens")
    height, width = grid_of(call, 2, tokens)
    return height, width


def to_image(x: Tensor, grid: tuple[int, ...], prefix: int = 0) -> Tensor:
    """Tokens (B, prefix + h*w, C) -> the cells as an image (B,C,h,w), without the prefix."""
    cells = x[:, prefix:].transpose(1, 2)
    return cells.reshape(*cells.shape[:2], *grid)


def to_tokens(image: Tensor) -> Tensor:
    """Image (B,C,h,w) -> tokens (B, h*w, C)."""
    return image.flatten(2).transpose(1, 2)


def convolved(
    x: Tensor, conv: Callable[[Tensor], Tensor], grid: tuple[int, ...], prefix: int = 0
) -> Tensor:
    """A size-preserving convolution of the cells of x (B, prefix + h*w, C); zeros for the
    prefix.
    """
    if x.shape[1] == prefix:
        return x.new_zeros(x.shape)
    return F.pad(to_tokens(conv(to_image(x, grid, prefix))), (0, 0, prefix, 0))


@dataclass(frozen=True)
class Tiling:
    """A grid cut into rectangular tiles."""

    grid: Sides
    tile: Sides

    def __post_init__(self) -> None:
        if min(self.tile) < 1:
            raise ArgumentError("tile", "positive side lengths", self.tile)

    @property
    def counts(self) -> Sides:
        """Tiles per column and per row."""
        return -(-self.grid[0] // self.tile[0]), -(-self.grid[1] // self.tile[1])

    @property
    def full(self) -> Sides:
        """The grid with the added cells."""
        return self.counts[0] * self.tile[0], self.counts[1] * self.tile[1]

    def filled(self, x: Tensor) -> Tensor:
        """x (B,h*w,C) with zeros in the added cells."""
        if self.full == self.grid:
            return x
        below, right = self.full[0] - self.grid[0], self.full[1] - self.grid[1]
        return F.pad(x.unflatten(1, self.grid), (0, 0, 0, right, 0, below)).flatten(1, 2)

    def cropped(self, x: Tensor) -> Tensor:
        """x (B,h'*w',C) of the filled grid without the added cells; undoes `filled`."""
        if self.full == self.grid:
            return x
        return x.unflatten(1, self.full)[:, : self.grid[0], : self.grid[1]].flatten(1, 2)

    def split(self, x: Tensor) -> Tensor:
        """x (B,h*w,C) -> (B,T,area,C), zeros in the added cells."""
        rows, columns = self.counts
        cells = self.filled(x).reshape(
            x.shape[0], rows, self.tile[0], columns, self.tile[1], x.shape[-1]
        )
        return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def join(self, tiles: Tensor) -> Tensor:
        """(B,T,area,C) -> (B,h*w,C), without the added cells; undoes `split`."""
        cells = tiles.reshape(tiles.shape[0], *self.counts, *self.tile, tiles.shape[-1])
        return self.cropped(cells.transpose(2, 3).flatten(1, 4))

    def real(self, padding: Tensor | None, like: Tensor) -> Tensor | None:
        """Which cells of each tile are real tokens (B,T,area), from call.padding (B,h*w); None: all
        are. `like` (B,h*w,C) gives batch and device.
        """
        if padding is None:
            if self.full == self.grid:
                return None
            padding = torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
        return self.split(padding[..., None])[..., 0]

    def means(self, x: Tensor, real: Tensor | None) -> Tensor:
        """Mean (B,T,C) of the real cells of each tile of x (B,h*w,C); zero where it has none."""
        if real is None and self.full == self.grid and x.numel():
            return to_tokens(F.avg_pool2d(to_image(x, self.grid), self.tile))
        return tile_means(self.split(x), real)


def tile_means(tiles: Tensor, real: Tensor | None) -> Tensor:
    """Mean (B,T,C) of the real cells of each tile (B,T,area,C); zero where a tile has none."""
    if real is None:
        return tiles.mean(2)
    total = tiles.masked_fill(~real[..., None], 0.0).sum(2)
    return total / real.sum(-1, keepdim=True).clamp_min(1)
