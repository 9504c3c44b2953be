r"""Shards: every head sees its local blocks and one of every `stride` key blocks, another one than
the next head, so that the heads together see the whole context.

    d = query // block - key // block        visible: -right < d < left, or
    absolute    (key // block + head * step + offset) mod stride = 0
    relative    (max(0, d - left + 1) + max(0, -d - right + 1)) mod stride = 0

An absolute stripe that a later query sees was seen before, so a cache holds local blocks and
stripes only. With step 1, `stride` patterns together see everything.
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
class Shards(Mask):
    """One block pattern per head.

    Attributes:
        block: tokens per block. local: blocks seen on the left and on the right, the own one
            included (one number: the same on both sides). stride: one block of so many is seen.
        pattern_heads: number of patterns; a group of heads / pattern_heads query heads shares one
            (None: each head has its own). dense_heads: so many of the last patterns see all.
        step: blocks by which the stripes of one pattern differ from the next one's (0: all heads
            alike); None: max(1, stride // heads), with query heads. offset: blocks added to all.
        relative: distances instead of absolute stripes.
    """

    block: int = 64
    local: int | tuple[int, int] = 16
    stride: int = 8
    pattern_heads: int | None = None
    dense_heads: int = 0
    step: int | None = None
    offset: int = 0
    relative: bool = False

    def __post_init__(self) -> None:
        if self.block < 1 or self.stride < 1 or min(self._sides) < 0:
            raise ArgumentError("Shards", "positive block and stride, local of at least 0", self)

    def visible(self, pairs: Pairs) -> Tensor:
        query, key = pairs.query // self.block, pairs.key // self.block
        left, right = self._sides
        seen = (query - key < left) & (key - query < right)
        if self.relative:
            seen = seen | (self._excess(query - key) % self.stride == 0)
        else:
            seen = seen | ((key + self._shift(pairs.h, pairs.heads)) % self.stride == 0)
        return self._or_dense(seen, pairs.h, pairs.heads)

    def alive(self, pairs: Pairs) -> Tensor:
        if self.relative:
            return super().alive(pairs)
        query, key = pairs.query // self.block, pairs.key // self.block
        stripe = (key + self._shift(pairs.h, pairs.heads)) % self.stride == 0
        near = query - key < self._sides[0]
        return self._or_dense(near | stripe, pairs.h, pairs.heads)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        first, last = tiles.key_low // self.block, tiles.key_high // self.block
        least = tiles.query_low // self.block - last
        most = tiles.query_high // self.block - first
        left, right = self._sides
        some, full = (least < left) & (most > -right), (most < left) & (least > -right)
        heads = tiles.frame.heads
        if self.relative:
            ends = torch.stack(torch.broadcast_tensors(self._excess(least), self._excess(most)))
            low, high, one = ends.amin(0), ends.amax(0), least == most
        else:
            shift = self._shift(tiles.h, heads)
            low, high, one = first + shift, last + shift, first == last
        striped = high // self.stride > (low - 1) // self.stride
        some = self._or_dense(some | striped, tiles.h, heads)
        return some, self._or_dense(full | (striped & one), tiles.h, heads)

    @property
    def _sides(self) -> tuple[int, int]:
        return (self.local, self.local) if isinstance(self.local, int) else self.local

    def _excess(self, distance: Tensor) -> Tensor:
        """Blocks beyond the local ones, on whichever side."""
        left, right = self._sides
        return (distance - left + 1).clamp_min(0) + (1 - distance - right).clamp_min(0)

    def _pattern(self, h: Tensor, heads: int) -> tuple[Tensor, int]:
        patterns = self.pattern_heads or heads
        if heads % patterns:
            raise ArgumentError("Shards.pattern_heads", f"a divisor of {heads} heads", patterns)
        return h // (heads // patterns), patterns

    def _shift(self, h: Tensor, heads: int) -> Tensor | int:
        step = max(1, self.stride // heads) if self.step is None else self.step
        return self._pattern(h, heads)[0] * step + self.offset if step else self.offset

    def _or_dense(self, seen: Tensor, h: Tensor, heads: int) -> Tensor:
        if not self.dense_heads:
            return seen
        pattern, patterns = self._pattern(h, heads)
        return seen | (pattern >= patterns - self.dense_heads)
