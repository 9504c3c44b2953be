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
from torch import Tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Query–key pairs under judgement: index tensors that broadcast against each other.

    b, h: batch and query-head index. query_index, key_index: rows of the present tensors. query,
    key: absolute positions.
    heads: number of query heads. grid, prefix: shape of the token grid and number of tokens before
    it.
    """

    b: Tensor
    h: Tensor
    query_index: Tensor
    key_index: Tensor
    query: Tensor
    key: Tensor
    heads: int
    grid: tuple[int, ...] | None = None
    prefix: int = 0


@dataclass(frozen=True, eq=False)
class Frame:
    """The coordinates of one call: turns row indices into positions.

    query_positions (B or 1, N) and key_positions (B or 1, M) are absolute.
    """

    batch: int
    heads: int
    query_positions: Tensor
    key_positions: Tensor
    grid: tuple[int, ...] | None = None
    prefix: int = 0

    def at(self, b: Tensor, h: Tensor, query_index: Tensor, key_index: Tensor) -> Pairs:
        """Pairs at the given indices, which must broadcast against each other."""
        query, key = (
            _look_up(self.query_positions, b, query_index),
            _look_up(self.key_positions, b, key_index),
        )
        return Pairs(b, h, query_index, key_index, query, key, self.heads, self.grid, self.prefix)

    def all(self) -> Pairs:
        """Every pair: tensors that broadcast to (B, H, N, M)."""
        device = self.key_positions.device
        n, m = self.query_positions.shape[-1], self.key_positions.shape[-1]
        return self.at(
            torch.arange(self.batch, device=device)[:, None, None, None],
            torch.arange(self.heads, device=device)[:, None, None],
            torch.arange(n, device=device)[:, None],
            torch.arange(m, device=device),
        )

    def rows(self, start: int, stop: int) -> Frame:
        """The same frame for queries start..stop-1."""
        part = self.query_positions[:, start:stop]
        return Frame(self.batch, self.heads, part, self.key_positions, self.grid, self.prefix)


def _look_up(positions: Tensor, b: Tensor, index: Tensor) -> Tensor:
    return positions[0][index] if positions.shape[0] == 1 else positions[b, index]


@dataclass(frozen=True)
class BlockMap:
    """Blocks of a mask: `some` marks blocks with a visible pair, `full` those where every pair is
    visible.

    Both are boolean (B or 1, H or 1, ceil(N / block), ceil(M / block)); a ragged last block counts
    only real pairs.
    """

    some: Tensor
    full: Tensor
    block: int

    @property
    def density(self) -> float:
        """Fraction of blocks that must be computed."""
        return self.some.float().mean().item()


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

    def __and__(self, other: Mask) -> Mask:
        return Both(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Either(self, other)

    def __invert__(self) -> Mask:
        return Outside(self)

    def dense(self, frame: Frame) -> Tensor:
        """Boolean matrix, (B or 1, H or 1, N, M)."""
        found = self.visible(frame.all())
        found = found[(None,) * (4 - found.ndim)]
        return found.expand(
            *found.shape[:2], frame.query_positions.shape[-1], frame.key_positions.shape[-1]
        )

    def mask_mod(self, frame: Frame) -> MaskMod:
        """The same predicate with flex_attention's signature (b, h, q_idx, kv_idx)."""

        def mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return self.visible(frame.at(b, h, q_idx, kv_idx))

        return mod

    def blocks(self, frame: Frame, block: int = 128) -> BlockMap:
        """Block map, built one row of blocks at a time, so that no N x M matrix is held."""
        n, m = frame.query_positions.shape[-1], frame.key_positions.shape[-1]
        some, full = [], []
        for start in range(0, n, block):
            seen = self.dense(frame.rows(start, min(start + block, n)))
            fringe = -m % block
            some.append(_tiles(seen, fringe, False, block).any(-1).any(2))
            full.append(_tiles(seen, fringe, True, block).all(-1).all(2))
        return BlockMap(torch.stack(some, 2), torch.stack(full, 2), block)


def _tiles(seen: Tensor, fringe: int, fill: bool, block: int) -> Tensor:
    padded = torch.nn.functional.pad(seen, (0, fringe), value=fill)
    return padded.unflatten(-1, (-1, block))


@dataclass(frozen=True)
class Both(Mask):
    """Visible to both masks."""

    left: Mask
    right: Mask

    def visible(self, pairs: Pairs) -> Tensor:
        return self.left.visible(pairs) & self.right.visible(pairs)

    def alive(self, pairs: Pairs) -> Tensor:
        return self.left.alive(pairs) & self.right.alive(pairs)


@dataclass(frozen=True)
class Either(Mask):
    """Visible to at least one of two masks."""

    left: Mask
    right: Mask

    def visible(self, pairs: Pairs) -> Tensor:
        return self.left.visible(pairs) | self.right.visible(pairs)

    def alive(self, pairs: Pairs) -> Tensor:
        return self.left.alive(pairs) | self.right.alive(pairs)


@dataclass(frozen=True)
class Outside(Mask):
    """Visible where the inner mask is not."""

    inner: Mask

    def visible(self, pairs: Pairs) -> Tensor:
        return ~self.inner.visible(pairs)


@dataclass(frozen=True)
class Causal(Mask):
    """A query sees keys at its own position and before. Without positions in the call the last
    query sees the last key.
    """

    def visible(self, pairs: Pairs) -> Tensor:
        return pairs.key <= pairs.query


@dataclass(frozen=True, eq=False)
class Real(Mask):
    """Padding: `keys` (B, M) is True where the key is a real token."""

    keys: Tensor

    def visible(self, pairs: Pairs) -> Tensor:
        return self.keys[pairs.b, pairs.key_index]


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
