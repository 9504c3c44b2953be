r"""SimPool: the tokens' own mean asks which of them to pool.

    q = W_q mean_n x_n        k, v = W_k LN(x), LN(x)        y = concat_h sum_n a_hn v_nh
    without W_q, W_k:  q, k, v = LN(mean_n x_n), LN(x), x

x: (B,N,C) -> y: (B,C); a = softmax(q . k s) per head, s = 1/sqrt(C/H). With an exponent gamma the
sum becomes a generalised mean, (sum_n a_n (v_n - min v + 1e-6)^gamma)^(1/gamma), plus, on demand, a
learned shift; min v is the least value of the sequence. (In the published code it is the batch's,
so that what an image becomes depends on its neighbours: `least="batch"`.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.core.call import Call
from regard.core.errors import ArgumentError
from regard.features.pooling import admitted, asked, check_heads, mean, read

Least = Literal["row", "batch"]


class SimPool(nn.Module):
    """(B,N,dim) -> (B,dim). heads: H; linear: with W_q and W_k, which may have a bias; scale: s;
    gamma, shift, least: of the generalised mean.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 1,
        linear: bool = True,
        bias: bool = False,
        scale: float | None = None,
        gamma: float | None = None,
        shift: bool = False,
        least: Least = "row",
    ) -> None:
        super().__init__()
        check_heads(dim, heads)
        if least not in ("row", "batch"):
            raise ArgumentError("least", "'row' or 'batch'", least)
        if gamma is not None and gamma <= 0:
            raise ArgumentError("gamma", "above 0, or None", gamma)
        if gamma is None and shift:
            raise ArgumentError("shift", "False without gamma", shift)
        self.dim, self.heads, self.scale, self.gamma = dim, heads, scale, gamma
        self.least: Least = least
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.q = nn.Linear(dim, dim, bias=bias) if linear else None
        self.k = nn.Linear(dim, dim, bias=bias) if linear else None
        self.shift = nn.Parameter(torch.zeros(1)) if shift else None

    def forward(
        self, x: Tensor, padding: Tensor | None = None, queries: Tensor | None = None
    ) -> Tensor:
        """padding (B,N): True = real; queries (B or 1,1,C): instead of the mean.

        Raises:
            ArgumentError: other shapes.
        """
        x, call = admitted(x, self.dim, padding)
        q = (
            mean(x, call)[:, None]
            if queries is None
            else asked(self.norm.weight[None], queries, len(x))
        )
        normed = self.norm(x)
        if self.q is not None and self.k is not None:
            q, k, v = self.q(q), self.k(normed), normed
        else:
            q, k, v = self.norm(q), normed, x
        heads = (self.heads, self.heads)
        if self.gamma is None:
            return read(q, k, v, heads, call, self.scale)[:, 0]
        lifted = self.lifted(v, call)
        powers = read(q, k, lifted**self.gamma, heads, call, self.scale)[:, 0]
        empty = powers == 0  # where no token is real
        y = powers.masked_fill(empty, 1.0).pow(1 / self.gamma).masked_fill(empty, 0.0)
        return y if self.shift is None else y + self.shift

    def lifted(self, v: Tensor, call: Call) -> Tensor:
        """Values (B,N,C) above their least one; 1 at padding."""
        if v.numel() == 0:
            return v
        axes = (0, 1, 2) if self.least == "batch" else (1, 2)
        if call.padding is None:
            return v - v.amin(axes, keepdim=True) + 1e-6
        gone = ~call.padding[..., None]
        lifted = v - v.masked_fill(gone, float("inf")).amin(axes, keepdim=True) + 1e-6
        return lifted.masked_fill(gone, 1.0)


def converted(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> SimPool:
    """A pool with the authors' weights, whose generalised mean knows the batch."""
    norm = state["norm_patches.weight"]
    pool = SimPool(
        len(norm),
        heads=config["num_heads"],
        linear="wq.weight" in state,
        bias="wq.bias" in state,
        scale=config.get("qk_scale"),
        gamma=config.get("gamma"),
        shift="beta" in state,
        least="batch",
    ).to(norm.dtype)
    names = {"norm_patches": "norm", "wq": "q", "wk": "k", "beta": "shift"}
    pool.load_state_dict(
        {".".join([names[n.split(".")[0]], *n.split(".")[1:]]): x for n, x in state.items()}
    )
    return pool.eval()
