r"""Chunks of unequal length: every key belongs to one, and a chunk is judged by its mean key.

    chunk of p = number of starts at or before p;  from the last start on, chunks of `size` tokens

Statistics are sums, so that new keys can be added to those of a cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def chunk_numbers(starts: Tensor, positions: Tensor, size: int) -> Tensor:
    """The chunk of each position (B,M), for ascending starts (B,C), whose last opens the equal
    chunks.
    """
    starts, positions = starts.contiguous(), positions.contiguous()
    equal = (positions - starts[:, -1:]).clamp_min(0).div(size, rounding_mode="floor")
    return torch.searchsorted(starts, positions, right=True) + equal


@dataclass(frozen=True, eq=False)
class ChunkSums:
    """Sums (B,C,D) of the keys in each chunk, and how many there are (B,C)."""

    sums: Tensor
    sizes: Tensor

    def plus(self, keys: Tensor, numbers: Tensor, real: Tensor) -> ChunkSums:
        """With keys (B,M,D) of chunks `numbers` (B,M) added, where real (B,M)."""
        most = int(numbers.amax()) + 1 if numbers.numel() else 0
        more = max(most - self.sizes.shape[1], 0)
        sums, sizes = F.pad(self.sums, (0, 0, 0, more)), F.pad(self.sizes, (0, more))
        keys = keys.masked_fill(~real[..., None], 0.0)
        return ChunkSums(
            sums.scatter_add(1, numbers[..., None].expand_as(keys), keys),
            sizes.scatter_add(1, numbers, real.long()),
        )

    def count(self) -> Tensor:
        """Keys in all, (B,)."""
        return self.sizes.sum(1)

    def means(self, *, normalised: bool) -> Tensor:
        """Mean keys (B,C,D); normalised: times the square root of the length, so that a long
        chunk's mean is not drowned by short ones.
        """
        sizes = self.sizes.clamp_min(1).to(self.sums.dtype)[..., None]
        return self.sums / (sizes.sqrt() if normalised else sizes)


def no_chunks(like: Tensor) -> ChunkSums:
    """Statistics of nothing yet, for keys such as these (B,M,D)."""
    sizes = torch.zeros(len(like), 0, dtype=torch.long, device=like.device)
    return ChunkSums(like.new_zeros(len(like), 0, like.shape[2]), sizes)
