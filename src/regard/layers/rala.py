r"""RALA, rank-augmented linear attention: keys weighed by a global query, outputs by the input.

    g = mean_i phi(q_i)        a_j = N softmax_j(g . phi(k_j) / sqrt(D))        phi = elu + 1
    o_i = R_i phi(q_i) . sum_j a_j R_j phi(k_j) v_j^T / (phi(q_i) . sum_j a_j phi(k_j) + N e)
    y_i = W_o ((o_i + (DWConv v)_i) ⊙ W_g x_i)        x: (B, h*w, C)  q, k, v: (B,H,h*w,D)

R_i turns channel pairs by row and column (`regard.features.axial`), e = 1e-6. The weights a and the
gate raise the ranks of state and output, which linear attention loses. N counts real tokens.
mixing="softmax" is the same layer around softmax attention on rotated q and k, for late stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.core.boundary import check_tokens
from regard.core.call import Call
from regard.core.card import Card, Claim, Cost, Example, Golden, Paper
from regard.core.errors import ArgumentError
from regard.core.recurrent import widened
from regard.core.scored import attend, without_padding
from regard.core.weights import Scored, Softmax, scale_of
from regard.features.axial import axial_angles
from regard.features.elu import elu_plus_one
from regard.features.grid import convolved, image_sides
from regard.features.rotary import rotate
from regard.layers.attention import join_heads, real_tokens, split_heads
from regard.layers.block import Block
from regard.layers.feedforward import FeedForward

Mixing = Literal["linear", "softmax"]


class Rala(nn.Module):
    """RALA layer on a 2-D grid, (B, h*w, C) -> (B, h*w, C).

    Args:
        dim: C. heads: H, D = C/H a multiple of 4. kernel: of the depthwise convolution, odd.
    """

    def __init__(self, dim: int, heads: int, *, mixing: Mixing = "linear", kernel: int = 5) -> None:
        super().__init__()
        if dim % heads or dim // heads % 4:
            raise ArgumentError("dim", f"a multiple of 4 * heads = {4 * heads}", dim)
        if mixing not in ("linear", "softmax"):
            raise ArgumentError("mixing", "'linear' or 'softmax'", mixing)
        if kernel % 2 == 0:
            raise ArgumentError("kernel", "an odd number", kernel)
        self.dim, self.heads, self.mixing = dim, heads, mixing
        self.q_proj, self.k_proj, self.v_proj, self.gate, self.o_proj = (
            nn.Linear(dim, dim) for _ in range(5)
        )
        self.lepe = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor, call: Call = Call()) -> Tensor:
        """x (B, h*w, C) -> (B, h*w, C); call.grid gives h and w."""
        check_tokens(x, self.dim, call)
        grid = image_sides(call, x.shape[1], "rala")
        call = call.of_self()
        x = real_tokens(x, call.padding)
        v = real_tokens(self.v_proj(x), call.padding)
        q, k = split_heads(self.q_proj(x), self.heads), split_heads(self.k_proj(x), self.heads)
        angles = axial_angles(grid, self.dim // self.heads, x.device)
        o = (_softmax if self.mixing == "softmax" else rank_augmented)(
            q, k, split_heads(v, self.heads), angles, call
        )
        return self.o_proj((join_heads(o) + convolved(v, self.lepe, grid)) * self.gate(x))


def _softmax(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, call: Call) -> Tensor:
    q, k = rotate(q, angles, "pairs"), rotate(k, angles, "pairs")
    return attend(q, k, v, call, Scored()).output


def rank_augmented(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, call: Call) -> Tensor:
    """Linear attention with global key weights; q, k, v (B,H,N,D), angles (N,D/2)."""
    real = torch.ones(1, q.shape[2], dtype=torch.bool, device=q.device)
    real = (real if call.padding is None else call.padding)[:, None, None]  # (B, 1, 1, N)
    count = real.sum(-1, keepdim=True).clamp_min(1)
    dtype, q, k, v = q.dtype, *(widened(x) for x in (elu_plus_one(q), elu_plus_one(k), v))
    q, k, v = without_padding(q, k, v, call)
    mean = q.sum(2, keepdim=True) / count
    scores = mean @ k.mT * scale_of(call, None, q.shape[-1])
    alpha = count * Softmax()(scores, real, real.sum(-1, keepdim=True))
    k = k * alpha.mT
    total = (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True) + 1e-6 * count.to(q.dtype)
    o = rotate(q, angles, "pairs") @ (rotate(k, angles, "pairs").mT @ v) / total
    return o.to(dtype)


_NAMES = {
    "norm1.norm": "norm1",
    "norm2.norm": "norm2",
    "attn.lepe": "mixer.lepe",
    "attn.proj": "mixer.o_proj",
    "ffn.fc1": "feed_forward.fc1",
    "ffn.fc2": "feed_forward.fc2",
    "ffn.dwconv": "feed_forward.conv.conv",
    "pos": "cpe_first.conv",
}


def convert(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Block:
    """Our block with the weights of the authors' block."""
    dim, heads = config["embed_dim"], config["num_heads"]
    ours = Block(
        dim,
        Rala(dim, heads, mixing="linear" if config["flag"] == "l" else "softmax"),
        FeedForward(dim, config["ffn_dim"], conv=3),
        norm=partial(nn.LayerNorm, eps=1e-6),
        cpe_first=3,
        layer_scale=1e-6 if "gamma_1" in weights else None,
    )
    mine: dict[str, Tensor] = {}
    if "gamma_1" in weights:
        mine["factors"] = torch.stack([weights[f"gamma_{i}"].flatten() for i in (1, 2)])
    for name, tensor in weights.items():
        part, _, kind = name.rpartition(".")
        if part == "attn.qkvo":
            for own, rows in zip(
                ("q_proj", "k_proj", "v_proj", "gate"), tensor.chunk(4), strict=True
            ):
                mine[f"mixer.{own}.{kind}"] = rows
        elif part:
            mine[f"{_NAMES[part]}.{kind}"] = tensor
    wanted = ours.state_dict()
    ours.load_state_dict({n: w.reshape(wanted[n].shape) for n, w in mine.items()})
    return ours


def replay(case: Mapping[str, Any]) -> dict[str, Any]:
    """The attention alone and the whole block, on images."""
    block, image = convert(case["config"], case["state_dict"]), case["inputs"]["x"]
    x, call = image.flatten(2).mT, Call(grid=tuple(image.shape[2:]))
    outputs = {"y_attn": block.mixer(x, call), "y_block": block(x, call)}
    return {name: y.mT.reshape(image.shape) for name, y in outputs.items()}


RALA = Card(
    name="rala",
    kind="layer",
    build=Rala,
    papers=(Paper("2411.07635", "Breaking the Low-Rank Dilemma of Linear Attention", 2024),),
    family="recurrent",
    patterns=("noncausal self",),
    grids=(2,),
    cost=Cost(time=1, state="none"),
    claim=Claim(
        "classifies as well as softmax attention at linear cost",
        "regard compare --task digits --mechanisms softmax,rala",
    ),
    example=Example(grid=(4, 5)),
    goldens=(
        Golden(
            file="143_rala.pt",
            replay=replay,
            source="qhfan/RALA:classfication/RALA.py",
            commit="a86314f",
        ),
    ),
    convert=convert,
)
