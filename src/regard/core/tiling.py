"""Tiling: blocks of query rows with every block of keys that any of them may see, stacked where
they have one shape, so that one call computes many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regard.core.blocks import tiles_of
from regard.core.frame import Frame
from regard.core.mask import Mask

BLOCK = 128
"""Rows of a block of queries or keys."""
GATHERED_KEY = 32
"""A key gathered for one query costs about as much as this many keys read by a whole block of
queries (measured on two cores at head width 32).
"""


@dataclass(frozen=True, eq=False)
class Stack:
    """T tiles of one shape: tile t is the `height` query rows from rows[t] of the `span` heads from
    heads[t], against `width` keys.

    keys: the first key of each tile, whose keys are then consecutive and whose tiles follow one
    another at fixed steps; or blocks of keys (T, c), `block` keys each, the last perhaps shorter.
    partial: the run of a tile's keys that some of its queries may not see; empty where all see all.
    """

    heads: tuple[int, ...]
    span: int
    rows: tuple[int, ...]
    height: int
    keys: tuple[int, ...] | Tensor
    width: int
    partial: slice
    block: int = BLOCK

    @property
    def count(self) -> int:
        """Number of tiles."""
        return len(self.rows)

    @property
    def full(self) -> bool:
        """Whether every pair is visible."""
        return self.partial.start == self.partial.stop

    @property
    def in_step(self) -> bool:
        """Whether the keys of each tile are consecutive and the tiles follow at fixed steps."""
        return isinstance(self.keys, tuple)

    @property
    def key_blocks(self) -> Tensor:
        """Blocks of keys (T, c)."""
        if isinstance(self.keys, Tensor):
            return self.keys
        first = torch.tensor(self.keys) // self.block
        return first[:, None] + torch.arange(-(-self.width // self.block))

    @property
    def diagonal(self) -> bool:
        """Whether all tiles have their keys at one distance from their rows."""
        if not isinstance(self.keys, tuple):
            return False
        return len({key - row for key, row in zip(self.keys, self.rows, strict=True)}) == 1

    def tiles(self, start: int, stop: int) -> Stack:
        """The tiles start … stop-1."""
        return replace(
            self,
            heads=self.heads[start:stop],
            rows=self.rows[start:stop],
            keys=self.keys[start:stop],
        )

    def of_heads(self, offset: int, span: int) -> Stack:
        """The same tiles for `span` of their heads, from the one numbered `offset`."""
        return replace(self, heads=tuple(h + offset for h in self.heads), span=span)

    def in_heads(self, most: int, group: int) -> Iterator[Stack]:
        """The same tiles in parts of at most `most` heads (at least one), which read whole groups
        of `group` heads or one key head.
        """
        span = min(self.span, max(1, most))
        if span < self.span:
            span -= span % group if span > group else 0
            while span < group and group % span:
                span -= 1
        for offset in range(0, self.span, span):
            yield self.of_heads(offset, min(span, self.span - offset))

    def key_index(self, device: torch.device) -> Tensor:
        """Rows of the keys, (T, width)."""
        if isinstance(self.keys, tuple):
            first = torch.tensor(self.keys, device=device)
            return first[:, None] + torch.arange(self.width, device=device)
        own = torch.arange(self.block, device=device)
        return (self.keys.to(device)[..., None] * self.block + own).flatten(1)[:, : self.width]


def plan_tiles(frame: Frame, mask: Mask | None, block: int = BLOCK, group: int = 1) -> list[Stack]:
    """Tiles of a call that somebody sees, stacked; sequences of a batch share them, and so do
    neighbouring heads with the same pattern. group: query heads per key head; a tile's heads read
    one key head, or whole groups.
    """
    some, full = _block_maps(frame, mask, block)
    runs = _alike(some, full, frame.heads, group)
    firsts = [run.start for run in runs] if some.shape[0] > 1 else [0]
    facts, columns = _facts(some[firsts], full[firsts])
    shapes: dict[tuple[int, ...], list[_Row]] = {}
    n, m = frame.query_positions.shape[-1], frame.key_positions.shape[-1]
    for run, row, count, first, last, low, high, offset in facts:
        if not count:
            continue
        heads, start = runs[run], row * block
        width = count * block - max(0, (last + 1) * block - m)
        low, high = low * block, min(high * block, width)
        scattered = last - first + 1 != count
        shape = (heads.stop - heads.start, min(block, n - start), width, low, high, scattered)
        shapes.setdefault(shape, []).append(_Row(heads.start, start, first * block, offset))
    order = sorted(shapes, key=lambda shape: -shape[2])  # the widest first: others reuse its memory
    return [stack for shape in order for stack in _stacks(shape, shapes[shape], columns, block)]


@dataclass(frozen=True)
class _Row:
    """A block of rows: its first head, row and key, and where its blocks of keys are listed."""

    head: int
    row: int
    key: int
    offset: int


def _block_maps(frame: Frame, mask: Mask | None, block: int) -> tuple[Tensor, Tensor]:
    """Blocks with a visible pair and blocks where every pair is: (1 or H, rows, columns)."""
    n, m = frame.query_positions.shape[-1], frame.key_positions.shape[-1]
    shape = (1, 1, -(-n // block), -(-m // block))
    if mask is None:
        every = torch.ones(shape[1:], dtype=torch.bool)
        return every, every
    some, full = mask.bounds(tiles_of(frame, block, block))
    shape = torch.broadcast_shapes(some.shape, full.shape, shape)
    return some.expand(shape).any(0).cpu(), full.expand(shape).all(0).cpu()


def _alike(some: Tensor, full: Tensor, heads: int, group: int) -> list[slice]:
    """Runs of neighbouring heads with one pattern, broken where a group of heads begins."""
    if some.shape[0] == 1:
        return [slice(0, heads)]
    differs = ((some[1:] != some[:-1]) | (full[1:] != full[:-1])).flatten(1).any(1).tolist()
    if not any(differs):
        return [slice(0, heads)]
    starts = [0, *(h for h in range(1, heads) if differs[h - 1] or (group > 1 and h % group == 0))]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], heads], strict=True)]


def _facts(some: Tensor, full: Tensor) -> tuple[list[list[int]], Tensor]:
    """Per run of heads and block of rows: run, row, number of visible blocks, the first and last of
    them, the range of those that are not full, counted among the visible ones, and where the list
    of visible blocks (second result) holds them.
    """
    count = some.sum(-1)
    first, last = _ends(some)
    rank = some.cumsum(-1)
    rough = some & ~full
    low, high = (rank.gather(-1, end[..., None])[..., 0] for end in _ends(rough))
    none = ~rough.any(-1)
    low, high = (low - 1).masked_fill(none, 0), high.masked_fill(none, 0)
    offset = count.flatten().cumsum(0).view_as(count) - count
    run = torch.arange(count.shape[0])[:, None].expand_as(count)
    row = torch.arange(count.shape[1]).expand_as(count)
    table = torch.stack([run, row, count, first, last, low, high, offset], -1)
    return table.flatten(0, 1).tolist(), some.nonzero()[:, -1]


def _ends(marks: Tensor) -> tuple[Tensor, Tensor]:
    """First and last marked place of the last axis (any place where none is)."""
    marks = marks.to(torch.uint8)
    return marks.argmax(-1), marks.shape[-1] - 1 - marks.flip(-1).argmax(-1)


def _stacks(
    shape: tuple[int, ...], rows: list[_Row], columns: Tensor, block: int
) -> Iterator[Stack]:
    span, height, width, low, high, scattered = shape
    for part in [rows] if scattered else _in_step(rows):
        keys: tuple[int, ...] | Tensor = tuple(r.key for r in part)
        if scattered:
            own = torch.arange(-(-width // block))
            keys = columns[torch.tensor([r.offset for r in part])[:, None] + own]
        heads, starts = tuple(r.head for r in part), tuple(r.row for r in part)
        yield Stack(heads, span, starts, height, keys, width, slice(low, high), block)


def _in_step(rows: list[_Row]) -> Iterator[list[_Row]]:
    """Longest runs of one head whose rows and keys advance by fixed steps."""
    part: list[_Row] = []
    step = None
    for row in rows:
        own = (row.row - part[-1].row, row.key - part[-1].key) if part else None
        joins = bool(part) and row.head == part[0].head and own is not None and own[1] >= 0
        if joins and (len(part) == 1 or own == step):
            step = own
        elif part:
            yield part
            part, step = [], None
        part.append(row)
    if part:
        yield part
