r"""Agent attention for images: pooled queries read the keys and pass it on, with position biases on
both ways and a convolution of the values.

    y = W_o [ softmax(q a^T s + b_out) softmax(a k^T s + b_in) v + DWConv(v) ]     a = pool(q)

x, y: (B, prefix + h*w, C); the n agents a are means of sqrt(n) x sqrt(n) blocks of q. b_in (H,n,M)
is a 7 x 7 table resized to the grid of keys plus a term per row and one per column, b_out (H,N,n)
likewise for queries. Prefix tokens (CLS) have biases of their own and are neither pooled nor
convolved. With `reduction` r keys and values come from an r x r strided convolution (PVT).

Beyond the paper: terms per row and column are resized too, so any grid is served.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.boundary import check_tokens, grid_of, refuse
from regard.core.call import Call
from regard.core.card import Card, Claim, Cost, Example, Golden
from regard.core.errors import ArgumentError
from regard.features.grid import Sides, to_image, to_tokens
from regard.layers.attention import join_heads, real_tokens, split_heads
from regard.layers.grid_bias import GridBias, resized
from regard.operators.agent import PAPER, pooled_agents, through_agents


class Agent(nn.Module):
    """Agent attention, (B, prefix + h*w, C) -> the same, on call.grid = (h,w).

    Args:
        dim: width C. heads: heads H. agents: n, a square number. grid: the usual (h,w), at which
            biases per row and column are learned. prefix: tokens before the image. reduction: r.
            bias: on q, k, v.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        agents: int = 49,
        grid: Sides = (14, 14),
        prefix: int = 0,
        reduction: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ArgumentError("heads", f"a divisor of dim={dim}", heads)
        if agents < 1 or math.isqrt(agents) ** 2 != agents:
            raise ArgumentError("agents", "a square number", agents)
        if reduction < 1 or min(grid) < reduction:
            raise ArgumentError("reduction", f"1 to {min(grid)}, the shorter side", reduction)
        self.dim, self.heads, self.agents = dim, heads, agents
        self.prefix, self.reduction = prefix, reduction
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.kv_proj = nn.Linear(dim, 2 * dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        if reduction > 1:
            self.reduce = nn.Conv2d(dim, dim, reduction, stride=reduction)
            self.norm = nn.LayerNorm(dim)
        fewer = (grid[0] // reduction, grid[1] // reduction)
        self.inward = GridBias(heads, agents, fewer, prefix)
        self.outward = GridBias(heads, agents, grid, prefix)

    def forward(self, x: Tensor, call: Call = Call()) -> Tensor:
        """Noncausal; padded tokens are hidden and left out of the means."""
        check_tokens(x, self.dim, call)
        refuse(call, "agent", "mask")
        if call.prefix != self.prefix:
            raise ArgumentError("call.prefix", f"{self.prefix}, as constructed", call.prefix)
        high, wide = grid_of(call, 2, x.shape[1])
        grid = (high, wide)
        call, x = call.of_self(), real_tokens(x, call.padding)
        source, fewer, real = self._reduced(x, grid, call)
        kv = real_tokens(self.kv_proj(source), real)
        q, k, v = (split_heads(t, self.heads) for t in (self.q_proj(x), *kv.chunk(2, -1)))
        a, found = pooled_agents(q, call, self.agents)
        mixed = through_agents(
            q,
            k,
            v,
            a,
            call.but(padding=real),
            found,
            inward=self.inward(fewer),
            outward=self.outward(grid).transpose(1, 2),
        )
        return self.o_proj(join_heads(mixed.output) + self._convolved(join_heads(v), fewer, grid))

    def _reduced(self, x: Tensor, grid: Sides, call: Call) -> tuple[Tensor, Sides, Tensor | None]:
        """Tokens for keys and values, their grid, and which of them hold a real token."""
        r = self.reduction
        if r == 1:
            return x, grid, call.padding
        cells = self.norm(to_tokens(self.reduce(to_image(x, grid, self.prefix))))
        source = torch.cat([x[:, : self.prefix], cells], 1)
        real = call.padding
        if real is not None:
            inside = to_image(real[..., None].to(x.dtype), grid, self.prefix)
            found = to_tokens(F.max_pool2d(inside, r))[..., 0] > 0
            real = torch.cat([real[:, : self.prefix], found], 1)
        return source, (grid[0] // r, grid[1] // r), real

    def _convolved(self, v: Tensor, grid: Sides, full: Sides) -> Tensor:
        """Depthwise convolution of v (B, prefix + cells, C), resized to the full grid; 0 for the
        prefix.
        """
        image = self.conv(resized(to_image(v, grid, self.prefix), full))
        return F.pad(to_tokens(image), (0, 0, self.prefix, 0))


_BIASES = {
    "an_bias": ("inward.table", (0, 1, 2, 3)),
    "ah_bias": ("inward.rows", (0, 1, 2, 3)),
    "aw_bias": ("inward.columns", (0, 1, 2, 3)),
    "ac_bias": ("inward.prefix", (0, 1, 2)),
    "na_bias": ("outward.table", (0, 1, 2, 3)),
    "ha_bias": ("outward.rows", (0, 3, 1, 2)),
    "wa_bias": ("outward.columns", (0, 3, 1, 2)),
    "ca_bias": ("outward.prefix", (0, 2, 1)),
}
_LINEAR = {
    "q.": "q_proj.",
    "kv.": "kv_proj.",
    "proj.": "o_proj.",
    "dwc.": "conv.",
    "sr.": "reduce.",
    "norm.": "norm.",
}


def convert(config: Mapping[str, Any], state: Mapping[str, Any]) -> Agent:
    """A layer with the authors' weights: their DeiT (with CLS), PVT and Swin variants."""
    dim = config["dim"]
    module = Agent(
        dim,
        config.get("num_heads", 8),
        agents=config.get("agent_num", 49),
        grid=(state["ha_bias"].shape[2], state["wa_bias"].shape[3]),
        prefix=1 if "ac_bias" in state else 0,
        reduction=config.get("sr_ratio", 1),
        bias=config.get("qkv_bias", False),
    )
    own = module.state_dict()  # without CLS the prefix biases are empty and stay so
    for name, tensor in state.items():
        if name in _BIASES:
            ours, order = _BIASES[name]
            own[ours] = (tensor if len(order) == tensor.ndim else tensor[0]).permute(order)
        elif name.startswith("qkv."):
            end = name.removeprefix("qkv.")
            own["q_proj." + end], own["kv_proj." + end] = tensor[:dim], tensor[dim:]
        else:
            start = next(s for s in _LINEAR if name.startswith(s))
            own[_LINEAR[start] + name.removeprefix(start)] = tensor
    module.load_state_dict(own)
    return module


def _replay(case: Mapping[str, Any]) -> dict[str, Any]:
    inputs, state = case["inputs"], case["state_dict"]
    module = convert(case["config"], state)
    grid = (state["ha_bias"].shape[2], state["wa_bias"].shape[3])
    if "H" in inputs:
        grid = (int(inputs["H"]), int(inputs["W"]))
    return {"y": module(inputs["x"], Call(grid=grid, prefix=module.prefix))}


AGENT = Card(
    name="agent",
    kind="layer",
    build=Agent,
    papers=(PAPER,),
    family="pooled",
    patterns=("noncausal self",),
    grids=(2,),
    cost=Cost(time=1, state="none"),
    claim=Claim(
        "reads digits through nine agents as well as through all pairs",
        "regard compare --task digits --mechanisms 'softmax,agent(agents=9,grid=(8,8))'",
    ),
    example=Example(
        grid=(5, 6),
        prefix=1,
        options={"agents": 4, "grid": (6, 6), "prefix": 1, "reduction": 2},
    ),
    goldens=(Golden("120_agent_attention.pt", _replay, "LeapLabTHU/Agent-Attention", "207ce3e"),),
    convert=convert,
    deviations=("biases per row and column are resized too, so that any grid is served",),
)
