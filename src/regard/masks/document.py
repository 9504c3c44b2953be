"""Document: packed sequences; a query sees only keys of its own document."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.core.blocks import Tiles, edges
from regard.core.frame import Pairs
from regard.core.mask import Mask


@dataclass(frozen=True, eq=False)
class Document(Mask):
    """queries (B,N) and keys (B,M) are integer document numbers; equal numbers may attend."""

    queries: Tensor
    keys: Tensor

    def visible(self, pairs: Pairs) -> Tensor:
        return self.queries[pairs.b, pairs.query_index] == self.keys[pairs.b, pairs.key_index]

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        query_low, query_high = edges(self.queries, tiles.query_block)
        key_low, key_high = edges(self.keys, tiles.key_block)
        query_low, query_high = query_low[:, None, :, None], query_high[:, None, :, None]
        key_low, key_high = key_low[:, None, None], key_high[:, None, None]
        some = (key_low <= query_high) & (query_low <= key_high)
        one = (query_low == query_high) & (key_low == key_high)
        return some, one & (query_low == key_low)
