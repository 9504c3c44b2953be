r"""CAE's pool: one learned query attends to tokens normalised apart for keys and for values.

    y = W_o concat_h sum_n softmax_n(q_h . k_nh s) v_nh
    q, k, v = W_q LN_q(u + p_q), W_k LN_k(x + p), W_v LN_v(x)

x: (B,N,C); u: (C); y: (B,C); W_q and W_v may have a bias, W_k has none; s = 1/sqrt(D). p: positions
for the keys, p_q for the query, if given. Nothing is added to what is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regard.features.pooling import admitted, asked, check_heads, read


class CaePool(nn.Module):
    """(B,N,dim) -> (B,dim). heads: H; head_dim: D (default dim/H); bias: W_q and W_v; scale: s."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        bias: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if head_dim is None:
            check_heads(dim, heads)
        inner = heads * (head_dim or dim // heads)
        self.heads, self.scale = heads, scale
        self.query = nn.Parameter(torch.zeros(1, dim))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(dim) for _ in range(3))
        self.q, self.v = nn.Linear(dim, inner, bias=bias), nn.Linear(dim, inner, bias=bias)
        self.k = nn.Linear(dim, inner, bias=False)
        self.out = nn.Linear(inner, dim)

    def forward(
        self,
        x: Tensor,
        padding: Tensor | None = None,
        places: Tensor | None = None,
        query_place: Tensor | None = None,
    ) -> Tensor:
        """padding (B,N): True = real; places, broadcastable to (B,N,C): p; query_place (1 or
        B,1,C): p_q.

        Raises:
            ArgumentError: other shapes.
        """
        x, call = admitted(x, self.query.shape[1], padding)
        keys = x if places is None else x + places
        query = asked(self.query, None, len(x))
        query = query if query_place is None else query + query_place
        q, k, v = self.q(self.norm_q(query)), self.k(self.norm_k(keys)), self.v(self.norm_v(x))
        return self.out(read(q, k, v, (self.heads, self.heads), call, self.scale))[:, 0]


NAMES = {
    "query_token": "query",
    "norm1_q": "norm_q",
    "norm1_k": "norm_k",
    "norm1_v": "norm_v",
    "cross_attn.q": "q",
    "cross_attn.k": "k",
    "cross_attn.v": "v",
    "cross_attn.q_bias": "q.bias",
    "cross_attn.v_bias": "v.bias",
    "cross_attn.proj": "out",
}
"""The authors' names of what we have; a norm that they never use is left out."""


def converted(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> CaePool:
    """A pool with the authors' weights."""
    inner, dim = state["cross_attn.q.weight"].shape
    pool = CaePool(
        dim,
        heads=config["num_heads"],
        head_dim=inner // config["num_heads"],
        bias="cross_attn.q_bias" in state,
        scale=config.get("qk_scale"),
    ).to(state["cross_attn.q.weight"].dtype)
    ours = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if name in NAMES:
            ours[NAMES[name]] = tensor[0] if name == "query_token" else tensor
        elif module in NAMES:
            ours[f"{NAMES[module]}.{kind}"] = tensor
    pool.load_state_dict(ours)
    return pool.eval()
