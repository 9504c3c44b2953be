"""The coordinates of a call: rows of the present tensors and their absolute positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pairs:
    """Query–key pairs under judgement: index tensors that broadcast against each other.

    b, h: batch and query-head index. query_index, key_index: rows of the present tensors. query,
    key: absolute positions.
    heads: number of query heads. grid, prefix: shape of the token grid and number of tokens before
    it. length: tokens of each pair's sequence, one more than its last key's position.
    """

    b: Tensor
    h: Tensor
    query_index: Tensor
    key_index: Tensor
    query: Tensor
    key: Tensor
    heads: int
    length: Tensor
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

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence (B or 1,): one more than the last key's position."""
        keys = self.key_positions
        return keys.amax(-1) + 1 if keys.shape[-1] else keys.new_zeros(keys.shape[0])

    @property
    def consecutive(self) -> bool:
        """Whether positions rise by one from row to row, of queries and of keys."""
        both = self.query_positions, self.key_positions
        return all(bool((x[:, 1:] - x[:, :-1] == 1).all()) for x in both)

    def at(
        self,
        b: Tensor,
        h: Tensor,
        query_index: Tensor,
        key_index: Tensor,
        lengths: Tensor | None = None,
    ) -> Pairs:
        """Pairs at the given indices, which must broadcast against each other. lengths: those of
        the frame, where they must not be computed here (a compiled kernel cannot reduce).
        """
        lengths = self.lengths if lengths is None else lengths
        query, key = (
            _look_up(self.query_positions, b, query_index),
            _look_up(self.key_positions, b, key_index),
        )
        length = lengths[0] if lengths.shape[0] == 1 else lengths[b]
        return Pairs(
            b, h, query_index, key_index, query, key, self.heads, length, self.grid, self.prefix
        )

    def all(self) -> Pairs:
        """Every pair: tensors that broadcast to (B, H, N, M)."""
        return self.rows(0, self.query_positions.shape[-1])

    def rows(self, start: int, stop: int) -> Pairs:
        """Pairs of the queries start..stop-1 with every key: (B, H, stop - start, M)."""
        device = self.key_positions.device
        return self.at(
            torch.arange(self.batch, device=device)[:, None, None, None],
            torch.arange(self.heads, device=device)[:, None, None],
            torch.arange(start, stop, device=device)[:, None],
            torch.arange(self.key_positions.shape[-1], device=device),
        )


def _look_up(positions: Tensor, b: Tensor, index: Tensor) -> Tensor:
    return positions[0][index] if positions.shape[0] == 1 else positions[b, index]
