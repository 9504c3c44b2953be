"""Document: packed sequences; a query sees only keys of its own document."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.core.mask import Mask, Pairs


@dataclass(frozen=True, eq=False)
class Document(Mask):
    """queries (B,N) and keys (B,M) are integer document numbers; equal numbers may attend."""

    queries: Tensor
    keys: Tensor

    def visible(self, pairs: Pairs) -> Tensor:
        return self.queries[pairs.b, pairs.query_index] == self.keys[pairs.b, pairs.key_index]
