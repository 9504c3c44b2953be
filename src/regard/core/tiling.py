"""Tiling: a block of query rows with every block of keys that any of them may see."""

from __future__ import annotations

from dataclasses import dataclass

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
class Tile:
    """Query rows `rows` of heads `heads` against the keys `keys` (a slice, or row indices). `full`:
    every pair is visible.
    """

    heads: slice
    rows: slice
    keys: slice | Tensor
    full: bool


def plan_tiles(frame: Frame, mask: Mask | None, block: int = BLOCK) -> list[Tile]:
    """Tiles of a call; heads with the same pattern share theirs, sequences of a batch always do."""
    n, m = frame.query_positions.shape[-1], frame.key_positions.shape[-1]
    if mask is None:
        some = torch.ones(1, -(-n // block), -(-m // block), dtype=torch.bool)
        full = some
    else:
        some, full = mask.bounds(tiles_of(frame, block, block))
        shape = torch.broadcast_shapes(
            some.shape, full.shape, (1, 1, -(-n // block), -(-m // block))
        )
        some, full = some.expand(shape).any(0).cpu(), full.expand(shape).all(0).cpu()
    tiles = []
    for heads in _alike(some, full, frame.heads):
        for row in range(some.shape[1]):
            chosen = some[heads.start, row].nonzero().flatten().tolist()
            if chosen:
                whole = bool(full[heads.start, row, chosen].all())
                rows = slice(row * block, min((row + 1) * block, n))
                tiles.append(Tile(heads, rows, _rows_of(chosen, block, m), whole))
    return tiles


def _alike(some: Tensor, full: Tensor, heads: int) -> list[slice]:
    """Runs of neighbouring heads with one pattern."""
    if some.shape[0] == 1:
        return [slice(0, heads)]
    starts = [0]
    for h in range(1, heads):
        if not (torch.equal(some[h], some[h - 1]) and torch.equal(full[h], full[h - 1])):
            starts.append(h)
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], heads], strict=True)]


def _rows_of(blocks: list[int], block: int, m: int) -> slice | Tensor:
    first, last = blocks[0], blocks[-1]
    if last - first + 1 == len(blocks):
        return slice(first * block, min((last + 1) * block, m))
    rows = torch.tensor(blocks)[:, None] * block + torch.arange(block)
    return rows.flatten()[: None if rows[-1, -1] < m else m - int(rows[-1, -1]) - 1]


def width(tile: Tile) -> int:
    """Number of keys of a tile."""
    return tile.keys.stop - tile.keys.start if isinstance(tile.keys, slice) else len(tile.keys)
