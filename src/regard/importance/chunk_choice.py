r"""Tokens of the best chunks: what blocks of queries read when a token's score is its chunk's.

score_j = qbar . kbar_c(j)        qbar, kbar: means over heads, queries of a block, keys of a chunk
read    = the last `local` keys there are and those of highest score, `tokens` in all, of which
          the first `sinks` in order give way to the first keys there are
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.core.selected import choose
from regard.importance.chunks import ChunkSums
from regard.importance.query_blocks import QueryBlocks

Pooling = Literal["scaled_mean", "mean", "max"]
Ties = Literal["latest", "any"]


@dataclass(frozen=True)
class ChunkChoice:
    """tokens, local, sinks: see above. pooling: "scaled_mean" multiplies means by the square root
    of what they are of; "max" takes the greatest query of a block. ties: which of equal scores.
    """

    tokens: int
    local: int
    sinks: int
    pooling: Pooling = "scaled_mean"
    ties: Ties = "latest"

    def __post_init__(self) -> None:
        if not 0 <= self.local <= self.tokens or self.sinks < 0:
            raise ArgumentError("tokens, local, sinks", "tokens >= local >= 0, sinks >= 0", self)

    def scores(self, q: Tensor, blocks: QueryBlocks, chunks: ChunkSums, numbers: Tensor) -> Tensor:
        """Scores (B,T,M) of keys in chunks `numbers` (B,M) for blocks of queries q (B,H,N,D)."""
        scaled = self.pooling == "scaled_mean"
        q = q.mean(1, keepdim=True, dtype=chunks.sums.dtype)
        if self.pooling == "max":
            there = blocks.there.unflatten(1, (-1, blocks.size))[:, None, ..., None]
            asked = blocks.cut(q).masked_fill(~there, -torch.inf).amax(3)
            asked = asked.masked_fill(~there.any(3), 0.0)
        else:
            asked = blocks.mean(q)
        if scaled:
            asked = asked * blocks.counts().to(q.dtype).sqrt()[:, None, :, None]
        scores = asked[:, 0] @ chunks.means(normalised=scaled).mT
        return scores.gather(2, numbers[:, None].expand(-1, scores.shape[1], -1))

    def read(self, scores: Tensor, allowed: Tensor) -> Tensor:
        """Which of the allowed keys are read, booleans like scores (B,T,M); keys are in order."""
        behind = allowed.flip(-1).cumsum(-1).flip(-1)  # allowed keys from here on
        found = allowed & (behind <= self.local)
        rest, count = allowed & ~found, min(self.tokens - self.local, scores.shape[-1])
        if count and self.ties == "latest":
            found = found | choose(scores, rest, count).mask(scores.shape[-1])
        elif count:
            best = scores.masked_fill(~rest, -torch.inf).topk(count).indices
            found = found | (torch.zeros_like(rest).scatter_(2, best, True) & rest)
        first = allowed & (allowed.cumsum(-1) <= min(self.sinks, self.tokens))
        return (found & (found.cumsum(-1) > self.sinks)) | first
