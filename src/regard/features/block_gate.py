r"""Block gate: small learned maps of pooled queries and keys say how much a block of queries wants
a block of keys.

    G_ab = (W_q pool q_a) . (W_k pool k_b) / sqrt(w)        pool: per channel, max, min or mean

Pooling runs over the real tokens of a block, and its kinds stand side by side, so that W_k is
(c D, w) for c kinds; without W_q a query's mean meets keys of width D as it is. Pooled vectors may
be turned by the rotary angles of their block's first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from regard.core.errors import ArgumentError
from regard.core.weights import repeat_heads
from regard.features.rotary import rotate
from regard.importance.block_means import mean_keys

Pool = Literal["max", "min", "avg"]


def block_pooled(x: Tensor, real: Tensor, block: int, kinds: Sequence[Pool]) -> Tensor:
    """x (B,H,n*block,D), real (B or 1, n*block) -> (B,H,n,c*D); zeros for a block of padding."""
    gone = ~real.unflatten(1, (-1, block))[:, None, :, :, None]
    tiles, nothing = x.unflatten(2, (-1, block)), gone.all(3)
    parts = []
    for kind in kinds:
        if kind == "avg":
            parts.append(mean_keys(x, real, block))
        elif kind in ("max", "min"):
            sign = 1.0 if kind == "max" else -1.0
            greatest = (sign * tiles).masked_fill(gone, float("-inf")).amax(3)
            parts.append(sign * greatest.masked_fill(nothing, 0.0))
        else:
            raise ArgumentError("pooling", "'max', 'min' or 'avg'", kind)
    return torch.cat(parts, -1)


class BlockGate(nn.Module):
    """The gate of one attention layer.

    Args:
        heads, head_dim: H and D of the queries. kv_heads: heads of the keys (default H). block:
            tokens per block. width: w (default D). queries, keys: kinds of pooling. map_queries:
            whether queries get a map W_q; they need one if pooled in several ways or if w is not D.
            Without W_q there is one W_k for every query head, with it one for every key head.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        kv_heads: int | None = None,
        block: int = 64,
        width: int | None = None,
        queries: Sequence[Pool] = ("avg",),
        keys: Sequence[Pool] = ("max", "min", "avg"),
        map_queries: bool = False,
    ) -> None:
        super().__init__()
        kv_heads, self.width = kv_heads or heads, width or head_dim
        if heads % kv_heads or block < 1 or not queries or not keys:
            raise ArgumentError(
                "kv_heads, block", "a divisor of heads, at least 1", (kv_heads, block)
            )
        self.heads, self.block, self.queries, self.keys = heads, block, queries, keys
        maps = map_queries or len(queries) > 1 or self.width != head_dim
        rows = kv_heads if maps else heads
        self.k_maps = nn.Parameter(torch.empty(rows, len(keys) * head_dim, self.width))
        self.q_maps = None
        if maps:
            self.q_maps = nn.Parameter(torch.empty(heads, len(queries) * head_dim, self.width))
        for maps_of in self.parameters():
            for one in maps_of.unbind():
                nn.init.xavier_uniform_(one.detach())

    def pool_only(self) -> BlockGate:
        """Untrained: the mean key alone counts, so that G is the product of block means."""
        with torch.no_grad():
            self.k_maps.zero_()
            start = list(self.keys).index("avg") * self.width
            self.k_maps[:, start : start + self.width] = torch.eye(self.width)
        return self

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        real: Tensor,
        angles: Tensor | None = None,
        heads: Sequence[int] | None = None,
    ) -> Tensor:
        """G (B,h,n,n) of q (B,h,n*block,D), k (B,h_k,n*block,D), of which `real` (B or 1, ·) count.

        angles (…,n,w/2): rotary angles of the blocks. heads: which of the layer's query heads these
        are (None: all).
        """
        chosen = torch.tensor(list(range(self.heads) if heads is None else heads), device=q.device)
        asking = block_pooled(q, real, self.block, self.queries)
        if self.q_maps is not None:
            asking = asking @ self.q_maps.to(q.dtype)[chosen]
        asked = repeat_heads(block_pooled(k, real, self.block, self.keys), q.shape[1])
        group = self.heads // self.k_maps.shape[0]
        asked = asked @ self.k_maps.to(q.dtype)[chosen // group]
        if angles is not None:
            asking, asked = rotate(asking, angles), rotate(asked, angles)
        return asking @ asked.mT * self.width**-0.5
