r"""Mask algebra: who may attend to whom, as predicates on absolute positions.

A mask is a frozen record with one method, `visible(pairs)`, true where a query may attend to a key.
Masks combine with `&`, `|` and `~`, and the same predicate serves as a dense boolean (`dense`), as
a flex_attention `mask_mod` (`mask_mod`) and as a block map (`blocks`). Positions are carried by the
call, so a mask means the same with a cache, in a chunk, or under padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.blocks import BlockMap, Tiles
from regard.core.frame import Frame, Pairs

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Mask:
    """Base of the algebra. A subclass is a frozen dataclass with `visible`, and `alive` where keys
    can expire.
    """

    def visible(self, pairs: Pairs) -> Tensor:
        """Boolean, broadcastable: True where the query may attend to the key."""
        raise NotImplementedError

    def alive(self, pairs: Pairs) -> Tensor:
        """Boolean: may a query at this position *or later* still see the key? A cache drops keys
        that are not alive.
        """
        return torch.ones_like(pairs.query + pairs.key, dtype=torch.bool)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """Two booleans that broadcast to (B, H, nq, nk): may a pair of the block be visible, and
        surely all of them. Both may err to the safe side: the first to True, the second to False.
        """
        return tiles.unknown

    @property
    def by_distance(self) -> bool:
        """Whether visibility depends on the difference of the two positions alone, so that tiles on
        one diagonal share it.
        """
        return False

    def __and__(self, other: Mask) -> Mask:
        return Both(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Either(self, other)

    def __invert__(self) -> Mask:
        return Outside(self)

    def dense(self, frame: Frame) -> Tensor:
        """Boolean matrix, (B or 1, H or 1, N, M)."""
        return self.rows(frame, 0, frame.query_positions.shape[-1])

    def rows(self, frame: Frame, start: int, stop: int) -> Tensor:
        """The rows of the queries start..stop-1, (B or 1, H or 1, stop - start, M)."""
        found = self.visible(frame.rows(start, stop))
        found = found[(None,) * (4 - found.ndim)]
        return found.expand(*found.shape[:2], stop - start, frame.key_positions.shape[-1])

    def mask_mod(self, frame: Frame) -> MaskMod:
        """The same predicate with flex_attention's signature (b, h, q_idx, kv_idx)."""
        lengths = frame.lengths

        def mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return self.visible(frame.at(b, h, q_idx, kv_idx, lengths))

        return mod

    def blocks(self, frame: Frame, block: int = 128) -> BlockMap:
        """The exact block map for square blocks, one row of blocks at a time, so that no N x M
        matrix is held.
        """
        n, m = frame.query_positions.shape[-1], frame.key_positions.shape[-1]
        some, full = [], []
        for start in range(0, n, block):
            seen = self.rows(frame, start, min(start + block, n))
            some.append(F.pad(seen, (0, -m % block)).unflatten(-1, (-1, block)).any(-1).any(2))
            full.append(
                F.pad(seen, (0, -m % block), value=True).unflatten(-1, (-1, block)).all(-1).all(2)
            )
        return BlockMap(torch.stack(some, 2), torch.stack(full, 2), block)


@dataclass(frozen=True)
class Both(Mask):
    """Visible to both masks."""

    left: Mask
    right: Mask

    def visible(self, pairs: Pairs) -> Tensor:
        return self.left.visible(pairs) & self.right.visible(pairs)

    def alive(self, pairs: Pairs) -> Tensor:
        return self.left.alive(pairs) & self.right.alive(pairs)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        (some, full), (more, fuller) = self.left.bounds(tiles), self.right.bounds(tiles)
        return some & more, full & fuller

    @property
    def by_distance(self) -> bool:
        return self.left.by_distance and self.right.by_distance


@dataclass(frozen=True)
class Either(Mask):
    """Visible to at least one of two masks."""

    left: Mask
    right: Mask

    def visible(self, pairs: Pairs) -> Tensor:
        return self.left.visible(pairs) | self.right.visible(pairs)

    def alive(self, pairs: Pairs) -> Tensor:
        return self.left.alive(pairs) | self.right.alive(pairs)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        (some, full), (more, fuller) = self.left.bounds(tiles), self.right.bounds(tiles)
        return some | more, full | fuller

    @property
    def by_distance(self) -> bool:
        return self.left.by_distance and self.right.by_distance


@dataclass(frozen=True)
class Outside(Mask):
    """Visible where the inner mask is not."""

    inner: Mask

    def visible(self, pairs: Pairs) -> Tensor:
        return ~self.inner.visible(pairs)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        some, full = self.inner.bounds(tiles)
        return ~full, ~some

    @property
    def by_distance(self) -> bool:
        return self.inner.by_distance


@dataclass(frozen=True)
class Causal(Mask):
    """A query sees keys at its own position and before. Without positions in the call the last
    query sees the last key.
    """

    def visible(self, pairs: Pairs) -> Tensor:
        return pairs.key <= pairs.query

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        return tiles.key_low <= tiles.query_high, tiles.key_high <= tiles.query_low

    @property
    def by_distance(self) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class Real(Mask):
    """Padding: `keys` (B, M) is True where the key is a real token."""

    keys: Tensor

    def visible(self, pairs: Pairs) -> Tensor:
        return self.keys[pairs.b, pairs.key_index]

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        size, fringe = tiles.key_block, -self.keys.shape[1] % tiles.key_block
        some = F.pad(self.keys, (0, fringe)).unflatten(-1, (-1, size)).any(-1)
        full = F.pad(self.keys, (0, fringe), value=True).unflatten(-1, (-1, size)).all(-1)
        return some[:, None, None], full[:, None, None]


@dataclass(frozen=True, eq=False)
class Given(Mask):
    """Any flex_attention `mask_mod`, on row indices, as a mask of the algebra."""

    mod: MaskMod

    def visible(self, pairs: Pairs) -> Tensor:
        return self.mod(pairs.b, pairs.h, pairs.query_index, pairs.key_index)


def both(left: Mask | None, right: Mask | None) -> Mask | None:
    """Conjunction in which None means: everything is visible."""
    if left is None:
        return right
    return left if right is None else left & right
