r"""Neighborhood: a query sees the `kernel` nearest cells of its token grid, axis by axis.

    one axis of n cells, dilation d, stride s:  cell i has place p = i // d in the group i mod d of
    L = ceil((n - i mod d) / d) cells; its window is that of its leader
        l = min(p - p mod s + s // 2, L - 1)      [clip(l - w // 2, 0, L - w), … + w)
    causal axis:
        l = min(p - p mod s + s - 1, L - 1)       (l - w, p]

A window is pushed inside at the border, never cropped; only causal axes have rows with fewer keys.
Several axes: the product of their windows. Prefix tokens see all and are seen by all. stride 1 is
neighborhood attention, stride = kernel attention in blocks, of which the last is pushed inside too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.blocks import Tiles
from regard.core.errors import ArgumentError
from regard.core.frame import Pairs
from regard.core.mask import Mask


@dataclass(frozen=True)
class Axis:
    """The rule on one axis: kernel w, dilation d, stride s, causal or not."""

    kernel: int
    dilation: int = 1
    stride: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.dilation < 1:
            raise ArgumentError("kernel, dilation", "at least 1", (self.kernel, self.dilation))
        if not 1 <= self.stride <= self.kernel:
            raise ArgumentError("stride", f"1 to the kernel, {self.kernel}", self.stride)

    def window(self, cell: Tensor, cells: Tensor | int | None) -> tuple[Tensor, Tensor]:
        """First place and the one behind the last, within the cell's dilation group.

        cells: length of the axis, None where a causal axis has no known end.
        """
        place = cell // self.dilation
        lead = place - place % self.stride
        lead = lead + (self.stride - 1 if self.causal else self.stride // 2)
        if cells is None:
            return (lead - self.kernel + 1).clamp_min(0), place + 1
        size = (cells - cell % self.dilation + self.dilation - 1) // self.dilation
        lead = torch.minimum(lead, size - 1)
        if self.causal:
            return (lead - self.kernel + 1).clamp_min(0), place + 1
        last = (size - self.kernel).clamp_min(0)
        start = torch.minimum((lead - self.kernel // 2).clamp_min(0), last)
        return start, start + self.kernel

    def sees(self, query: Tensor, key: Tensor, cells: Tensor | int | None) -> Tensor:
        """Whether the key's cell lies in the window of the query's cell."""
        start, stop = self.window(query, cells)
        place = key // self.dilation
        near = (start <= place) & (place < stop)
        return near if self.dilation == 1 else near & ((query - key) % self.dilation == 0)


@dataclass(frozen=True)
class Neighborhood(Mask):
    """Neighbours on the call's grid; each field is one value for all axes, or one per axis.

    A 1-D grid may be left out: then the axis is as long as the sequence, and a causal one has no
    end.
    """

    kernel: int | tuple[int, ...]
    dilation: int | tuple[int, ...] = 1
    stride: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False

    def __post_init__(self) -> None:
        named = {len(f) for f in self._fields if isinstance(f, tuple)}
        if len(named) > 1:
            raise ArgumentError("kernel, dilation, stride, causal", "one length", self._fields)
        self.axes(named.pop() if named else 1)

    @property
    def _fields(self) -> tuple[Any, ...]:
        return self.kernel, self.dilation, self.stride, self.causal

    def axes(self, dims: int) -> tuple[Axis, ...]:
        """The rule of each of `dims` axes."""
        columns = [f if isinstance(f, tuple) else (f,) * dims for f in self._fields]
        if any(len(column) != dims for column in columns):
            raise ArgumentError("call.grid", f"{len(max(columns, key=len))} axes", f"{dims} axes")
        return tuple(Axis(*values) for values in zip(*columns, strict=True))

    def visible(self, pairs: Pairs) -> Tensor:
        grid = pairs.grid or (None,)
        query, key = pairs.query - pairs.prefix, pairs.key - pairs.prefix
        near: Any = True
        for number, (axis, cells) in enumerate(zip(self.axes(len(grid)), grid, strict=True)):
            inner = _size(grid[number + 1 :])
            row, own = query // inner, key // inner
            if number and cells is not None:  # a sequence may be open-ended
                row, own = row % cells, own % cells
            known = cells is not None or axis.causal
            near = near & axis.sees(row, own, cells if known else pairs.length - pairs.prefix)
        return near | (query < 0) | (key < 0)

    def alive(self, pairs: Pairs) -> Tensor:
        """Row by row of the first axis: a window never begins a kernel before its own cell."""
        axis, inner = self._first(pairs.grid)
        query, key = pairs.query - pairs.prefix, pairs.key - pairs.prefix
        row, own = query // inner, key // inner
        gap = (own - row) % axis.dilation  # the next query row of the key's dilation group
        late = (row + gap) // axis.dilation - own // axis.dilation < axis.kernel
        return late | (query < 0) | (key < 0)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        axis, inner = self._first(tiles.frame.grid)
        prefix, reach = tiles.frame.prefix, (axis.kernel - 1) * axis.dilation
        behind = (tiles.query_low - prefix) // inner - (tiles.key_high - prefix) // inner
        ahead = (tiles.key_low - prefix) // inner - (tiles.query_high - prefix) // inner
        some = (behind <= reach) & (ahead <= (0 if axis.causal else reach))
        some = some | (tiles.query_low < prefix) | (tiles.key_low < prefix)
        return some, torch.zeros_like(some)

    def _first(self, grid: tuple[int, ...] | None) -> tuple[Axis, int]:
        grid = grid or (1,)
        return self.axes(len(grid))[0], _size(grid[1:])

    def near(self, grid: tuple[int | None, ...], cells: int) -> tuple[Tensor, Tensor]:
        """Cells in the window of each cell of a grid, (cells, w) row-major numbers, and which of
        them lie inside it. A side may be None: all the cells, open-ended where causal.
        """
        index = torch.zeros(1, 1, dtype=torch.long)
        inside = torch.ones_like(index, dtype=torch.bool)
        for axis, known in zip(self.axes(len(grid)), grid, strict=True):
            side = cells if known is None else known
            own = torch.arange(side)
            start, stop = axis.window(own, known if axis.causal else side)
            place = start[:, None] + torch.arange(min(axis.kernel, -(-side // axis.dilation)))
            cell = place * axis.dilation + own[:, None] % axis.dilation
            good = (place < stop[:, None]) & (cell < side)
            index = (index[:, None, :, None] * side + cell[:, None]).flatten(2).flatten(0, 1)
            inside = (inside[:, None, :, None] & good[:, None]).flatten(2).flatten(0, 1)
        return index.clamp(0, max(cells - 1, 0)), inside


def _size(sides: tuple[int | None, ...]) -> int:
    total = 1
    for side in sides:
        total *= side or 0
    return total
