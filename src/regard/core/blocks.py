"""Block maps: which blocks of the query–key matrix hold a visible pair, found by interval
arithmetic on positions where a mask knows how, and exactly, by looking, where it is asked to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.frame import Frame


@dataclass(frozen=True, eq=False)
class Tiles:
    """Blocks of queries against blocks of keys, as intervals that broadcast to (B, H, nq, nk).

    query_low, query_high (B or 1, 1, nq, 1) and key_low, key_high (B or 1, 1, 1, nk) bound the
    absolute positions inside each block; h (H, 1, 1) numbers the heads. query_block and key_block
    are the block lengths, in rows of the present tensors.
    """

    frame: Frame
    query_low: Tensor
    query_high: Tensor
    key_low: Tensor
    key_high: Tensor
    h: Tensor
    query_block: int
    key_block: int

    @property
    def unknown(self) -> tuple[Tensor, Tensor]:
        """What can be said without looking: perhaps some pair is visible, surely not all."""
        some = torch.ones_like(self.query_low + self.key_low, dtype=torch.bool)
        return some, ~some


def tiles_of(frame: Frame, query_block: int, key_block: int) -> Tiles:
    """Tiles of a frame; the last block of either side may be shorter."""
    query_low, query_high = edges(frame.query_positions, query_block)
    key_low, key_high = edges(frame.key_positions, key_block)
    h = torch.arange(frame.heads, device=frame.key_positions.device)[:, None, None]
    return Tiles(
        frame,
        query_low[:, None, :, None],
        query_high[:, None, :, None],
        key_low[:, None, None],
        key_high[:, None, None],
        h,
        query_block,
        key_block,
    )


def edges(positions: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Least and greatest value in each block of (B, N): two (B, ceil(N / block))."""
    fringe = -positions.shape[-1] % block
    if fringe:
        positions = torch.cat([positions, positions[:, -1:].expand(-1, fringe)], -1)
    low, high = positions.unflatten(-1, (-1, block)).aminmax(dim=-1)
    return low, high


@dataclass(frozen=True)
class BlockMap:
    """Blocks of a mask: `some` marks blocks with a visible pair, `full` those where every pair is.

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
