r"""AbMILP (attention-based multiple-instance pooling): a small network scores each token by itself.

    y = sum_n softmax_n(f(x_n)) x_n        f = w . act(W … act(W x + b) …) + c

x: (B,N,C) -> y: (B,C). Tokens may first exchange by one head of self-attention, x' = W_o a v: f
then reads x' ("map"), and "both" means that x' is pooled too. Position embeddings may be added to
what f reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.core.errors import ArgumentError
from regard.core.weights import Softmax
from regard.features.pooling import admitted, read

Exchange = Literal["none", "map", "both"]


class AbMilp(nn.Module):
    """(B,N,dim) -> (B,dim). depth: linear maps in f; activation: "tanh" or "relu"; exchange: see
    the file's description.
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int = 2,
        activation: Literal["tanh", "relu"] = "tanh",
        exchange: Exchange = "none",
    ) -> None:
        super().__init__()
        if depth < 1 or activation not in ("tanh", "relu"):
            raise ArgumentError("depth, activation", "1 or more, 'tanh' or 'relu'", activation)
        if exchange not in ("none", "map", "both"):
            raise ArgumentError("exchange", "'none', 'map' or 'both'", exchange)
        self.dim = dim
        self.exchange: Exchange = exchange
        act = nn.Tanh if activation == "tanh" else nn.ReLU
        hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(dim, dim), act())]
        self.score = nn.Sequential(*hidden, nn.Linear(dim, 1))
        self.qkv = None if exchange == "none" else nn.Linear(dim, 3 * dim, bias=False)
        self.out = None if exchange == "none" else nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, padding: Tensor | None = None, places: Tensor | None = None
    ) -> Tensor:
        """padding (B,N): True = real; places, broadcastable to (B,N,C): position embeddings.

        Raises:
            ArgumentError: other shapes.
        """
        x, call = admitted(x, self.dim, padding)
        mixed = x
        if self.qkv is not None and self.out is not None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            mixed = self.out(read(q, k, v, (1, 1), call))
        scores = self.score(mixed if places is None else mixed + places).mT  # (B,1,N)
        visible = torch.ones_like(scores, dtype=torch.bool) if padding is None else padding[:, None]
        weights = Softmax()(scores, visible, visible.sum(-1, keepdim=True))
        return (weights @ (mixed if self.exchange == "both" else x))[:, 0]


def converted(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> AbMilp:
    """A pool with the authors' weights. (Their position embeddings are given with each call.)"""
    layers = [name for name in state if name.startswith("attention_predictor.")]
    first = state["attention_predictor.0.weight"]
    pool = AbMilp(
        first.shape[1],
        depth=len(layers) // 2,
        activation="tanh" if config.get("activation", "tanh") == "tanh" else "relu",
        exchange=config.get("self_attention_apply_to", "none"),
    ).to(first.dtype)
    ours = {name.replace("attention_predictor.", "score."): state[name] for name in layers}
    for name in ("qkv.weight", "out.weight", "out.bias"):
        theirs = "self_attn." + name.replace("out.", "proj.")
        if theirs in state:
            ours[name] = state[theirs]
    pool.load_state_dict(ours)
    return pool.eval()
