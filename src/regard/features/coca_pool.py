r"""CoCa's pool: every query head of one learned query reads a single shared key and value head.

    q = W_q LN(u)        k, v = W_k c, W_v c        c = x, or LN(x)
    y = W_o concat_h sum_n softmax_n(q_h . k_n s) v_n   (+ W_2 (silu(g) ⊙ f),  f, g = W_1 LN(u))

x: (B,N,C); u: (C'); k, v: (B,N,D); y: (B,C'); s = 1/sqrt(D). The norms have no bias. The published
head learns 196 queries and returns what the first has read, so the others change nothing; here
there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.errors import ArgumentError
from regard.features.pooling import admitted, asked, read


class CocaPool(nn.Module):
    """(B,N,dim) -> (B,width). heads: H; head_dim: D; width: C' (default dim); norm: of the tokens
    too; feed_forward: hidden width of the branch beside attention, 0 = none.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int = 64,
        width: int | None = None,
        norm: bool = False,
        feed_forward: int = 0,
    ) -> None:
        super().__init__()
        width = width or dim
        if min(dim, heads, head_dim, width) < 1 or feed_forward < 0:
            raise ArgumentError("sizes", "positive", (dim, heads, head_dim, width, feed_forward))
        self.dim, self.heads = dim, heads
        self.query = nn.Parameter(torch.randn(1, width))
        self.norm_q = nn.LayerNorm(width, bias=False)
        self.norm_x = nn.LayerNorm(dim, bias=False) if norm else nn.Identity()
        self.q = nn.Linear(width, heads * head_dim, bias=False)
        self.kv = nn.Linear(dim, 2 * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.fc1 = nn.Linear(width, 2 * feed_forward, bias=False) if feed_forward else None
        self.fc2 = nn.Linear(feed_forward, width, bias=False) if feed_forward else None

    def forward(
        self, x: Tensor, padding: Tensor | None = None, queries: Tensor | None = None
    ) -> Tensor:
        """padding (B,N): True = real; queries (B or 1,1,C'): instead of the learned one.

        Raises:
            ArgumentError: other shapes.
        """
        x, call = admitted(x, self.dim, padding)
        query = self.norm_q(asked(self.query, queries, len(x)))
        k, v = self.kv(self.norm_x(x)).chunk(2, dim=-1)
        y = self.out(read(self.q(query), k, v, (self.heads, 1), call))
        if self.fc1 is not None and self.fc2 is not None:
            f, g = self.fc1(query).chunk(2, dim=-1)
            y = y + self.fc2(f * F.silu(g))
        return y[:, 0]


NAMES = {
    "norm.gamma": "norm_q.weight",
    "context_norm.gamma": "norm_x.weight",
    "to_q.weight": "q.weight",
    "to_kv.weight": "kv.weight",
    "to_out.weight": "out.weight",
    "ff.0.weight": "fc1.weight",
    "ff.2.weight": "fc2.weight",
}
"""The authors' names of our parameters."""


def converted(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> CocaPool:
    """A pool with the authors' weights, and the one query of theirs that is read."""
    double, dim = state["to_kv.weight"].shape
    inner, width = state["to_q.weight"].shape
    pool = CocaPool(
        dim,
        heads=2 * inner // double,
        head_dim=double // 2,
        width=width,
        norm="context_norm.gamma" in state,
        feed_forward=state["ff.2.weight"].shape[1] if "ff.2.weight" in state else 0,
    ).to(state["to_q.weight"].dtype)
    ours = {ours: state[theirs] for theirs, ours in NAMES.items() if theirs in state}
    pool.load_state_dict({"query": state["img_queries"][:1], **ours})
    return pool.eval()
