r"""A tree for every block of queries: how keys are searched in hierarchically pruned attention.

C_t = tree_search(queries of block t, keys before their window)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.core.selected import Choice
from regard.importance.query_blocks import QueryBlocks
from regard.importance.tree_search import Representative, Search, tree_search


@dataclass(frozen=True)
class Tree:
    """keep: keys to find. block: keys of one block. query_block: queries that choose together, or
    (queries, stride) where only every stride-th of them searches. window: nearest keys, which are
    read besides. representative: the block that speaks for an interval.
    """

    keep: int = 512
    block: int = 2
    query_block: int | tuple[int, int] = 1
    window: int = 256
    sinks: int = 16
    representative: Representative = "center"

    def __post_init__(self) -> None:
        if min(self.keep, self.block, self.size, self.stride) < 1:
            raise ArgumentError("keep, block, query_block", "at least 1 each", self)
        if self.size % self.stride:
            raise ArgumentError("query_block", f"a multiple of {self.stride}", self.query_block)
        if self.window < 0 or self.sinks < 0:
            raise ArgumentError("window, sinks", "0 or more", self)

    @property
    def size(self) -> int:
        """Queries of a block."""
        return self.query_block if isinstance(self.query_block, int) else self.query_block[0]

    @property
    def stride(self) -> int:
        """One query in so many searches."""
        return 1 if isinstance(self.query_block, int) else self.query_block[1]

    def find(self, q: Tensor, k: Tensor, blocks: QueryBlocks, reach: Tensor) -> Choice:
        """Blocks of keys for each block of queries, (B,H,T,w): q (B,H,N,D) in any order, k
        (B,H_k,M,D) in sequence, of which a block may see the first `reach` (B,T).
        """
        there = blocks.there.unflatten(1, (-1, self.size))
        turn = torch.arange(self.size, device=q.device) % self.stride == self.stride - 1
        searching = there & turn
        searching = searching | (there & ~searching.any(-1, keepdim=True))  # a block cut short
        return tree_search(
            Search(
                blocks.cut(q.detach()),
                searching,
                k.detach(),
                reach,
                (reach - self.window).clamp_min(0),
                self.keep,
                self.block,
                self.representative,
            )
        )
