r"""AIM's pool: learned queries attend to batch-normalised tokens, and are averaged.

    z = batchnorm(x)        y = mean_q concat_h sum_n softmax_n(u_qh . (W_k z_n)_h s) (W_v z_n)_h

x: (B,N,C); u: (Q,C), split into heads as the keys; s = 1/sqrt(C/H). The batch norm has no
parameters; while training it takes its statistics from real tokens alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regard.features.pooling import admitted, asked, check_heads, read


class AimPool(nn.Module):
    """(B,N,dim) -> (B,dim). heads: H; queries: Q; bias: of W_k and W_v; scale: s."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 12,
        queries: int = 1,
        bias: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads, self.scale = heads, scale
        self.queries = nn.Parameter(0.02 * torch.randn(queries, dim))
        self.norm = nn.BatchNorm1d(dim, eps=1e-6, affine=False)
        self.k, self.v = nn.Linear(dim, dim, bias=bias), nn.Linear(dim, dim, bias=bias)

    def forward(
        self, x: Tensor, padding: Tensor | None = None, queries: Tensor | None = None
    ) -> Tensor:
        """padding (B,N): True = real; queries (B or 1,Q,C): instead of the learned ones.

        Raises:
            ArgumentError: other shapes.
        """
        x, call = admitted(x, self.queries.shape[1], padding)
        if padding is not None and self.training:
            x = x.masked_scatter(padding[..., None], self.norm(x[padding]))
        else:
            x = self.norm(x.mT).mT
        q = asked(self.queries, queries, len(x))
        heads = (self.heads, self.heads)
        return read(q, self.k(x), self.v(x), heads, call, self.scale).mean(1)


def converted(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> AimPool:
    """A pool with the authors' weights."""
    _, queries, dim = state["cls_token"].shape
    pool = AimPool(
        dim,
        heads=config["num_heads"],
        queries=queries,
        bias="k.bias" in state,
        scale=config.get("qk_scale"),
    ).to(state["k.weight"].dtype)
    names = {name.replace("bn.", "norm."): x for name, x in state.items() if name != "cls_token"}
    pool.load_state_dict({"queries": state["cls_token"][0], **names})
    return pool.eval()
