r"""Latent pool: learned queries attend to a text's hidden states and become its one unit vector.

    z = q + W_o Attention(W_q LN(q), W_k LN(x), W_v LN(x))        q: (r,C) learned, x: (B,N,C)
    y = mean_r (z + W_2 (u ⊙ gelu(g))) / norm,   u, g = halves of W_1 LN(z)

x are the tokens of the last layer, or, with `layers`, one mean vector per layer (`layer_means`), to
which a learned embedding of its layer is added. Padding is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.boundary import check_tokens
from regard.core.call import Call
from regard.core.errors import ArgumentError
from regard.core.scored import attend
from regard.core.weights import Scored


class LatentPool(nn.Module):
    """(B,N,dim) -> (B,dim). latents: r; heads, head_dim: of the attention; layers: N at most, when
    x is one vector per layer; 0: x are tokens.
    """

    def __init__(
        self,
        dim: int,
        *,
        latents: int = 768,
        heads: int = 32,
        head_dim: int = 2048,
        layers: int = 0,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads, self.layers = heads, layers
        self.latents = nn.Parameter(torch.randn(latents, dim))
        self.place = nn.Embedding(layers, dim) if layers else None
        self.norm_latents, self.norm_x = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q = nn.Linear(dim, inner, bias=False)
        self.kv = nn.Linear(dim, 2 * inner, bias=False)
        self.out = nn.Linear(inner, dim, bias=False)
        self.norm_pooled = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Unit vectors (B,dim) of x (B,N,dim); padding (B,N): True = real.

        Raises:
            ArgumentError: other shapes, or more vectors than there are layers.
        """
        call = Call(padding=padding)
        check_tokens(x, self.latents.shape[1], call)
        if self.place is not None:
            if x.shape[1] > self.layers:
                raise ArgumentError("x", f"at most {self.layers} layers", tuple(x.shape))
            x = x + self.place.weight[: x.shape[1]]
        k, v = self._heads(self.kv(self.norm_x(x))).chunk(2, dim=1)
        q = self._heads(self.q(self.norm_latents(self.latents))[None]).expand(len(x), -1, -1, -1)
        read = attend(q, k, v, call, Scored()).output.transpose(1, 2).flatten(2)  # (B,r,inner)
        pooled = self.out(read) + self.latents
        value, gate = self.fc1(self.norm_pooled(pooled)).chunk(2, dim=-1)
        pooled = pooled + self.fc2(value * F.gelu(gate))
        return F.normalize(pooled.mean(1), dim=-1)

    def _heads(self, x: Tensor) -> Tensor:
        """(B,N,i*inner) -> (B,i*H,N,D)."""
        width = self.q.out_features // self.heads
        return x.unflatten(-1, (-1, width)).transpose(1, 2)


def layer_means(states: Sequence[Tensor], padding: Tensor | None = None) -> Tensor:
    """Mean over real tokens of every layer's hidden states (B,N,C) each, as (B,L,C); leave the
    embeddings out. padding (B,N): True = real.
    """
    stacked = torch.stack(tuple(states), 1)
    if padding is None:
        return stacked.mean(2)
    real = padding[:, None, :, None]
    return stacked.masked_fill(~real, 0.0).sum(2) / real.sum(2).clamp_min(1)


NAMES = {
    "cross_attend_blocks.0.norm_context": "norm_latents",
    "cross_attend_blocks.0.norm": "norm_x",
    "cross_attend_blocks.0.fn.to_q": "q",
    "cross_attend_blocks.0.fn.to_kv": "kv",
    "cross_attend_blocks.0.fn.to_out": "out",
    "cross_attend_blocks.1.norm": "norm_pooled",
    "cross_attend_blocks.1.fn.net.0": "fc1",
    "cross_attend_blocks.1.fn.net.2": "fc2",
    "pos_emb": "place",
}
"""The authors' names of our modules."""


def converted(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> LatentPool:
    """A pool with the authors' weights."""
    pool = LatentPool(
        state["latents"].shape[1],
        latents=config["num_latents_value"],
        heads=config["num_cross_heads"],
        head_dim=config["cross_dim_head"],
        layers=len(state["pos_emb.weight"]) if "pos_emb.weight" in state else 0,
    ).to(state["latents"].dtype)
    ours = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        ours[f"{NAMES[module]}.{kind}" if module else name] = tensor
    pool.load_state_dict(ours)
    return pool.eval()
