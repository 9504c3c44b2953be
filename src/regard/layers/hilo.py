r"""HiLo attention: some heads attend within small windows, the others from every token to window
means.

    high:  o_i = sum_{j in window(i)} softmax_j(q_i . k_j / sqrt(D)) v_j
    low:   o_i = sum_w softmax_w(q_i . k_w / sqrt(D)) v_w
    y = [W_h o_high | W_l o_low]        x, y: (B, h*w, C)

Windows are s x s cells, k_w and v_w come from the mean token of window w. int(alpha H) of the H
heads are low, all of them at s = 1. No projection runs over both parts.

Differs from the published code, which needs s to divide h and w: border windows hold fewer cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.boundary import check_tokens
from regard.core.call import Call
from regard.core.card import Card, Claim, Cost, Example, Golden, Limit, Paper
from regard.core.errors import ArgumentError
from regard.core.scored import attend
from regard.core.weights import Scored
from regard.features.grid import Tiling, image_sides
from regard.layers.attention import join_heads, real_tokens, split_heads
from regard.layers.window_attention import attend_in_tiles


class HiLo(nn.Module):
    """High- and low-frequency attention, (B,h*w,C) -> (B,h*w,C) on call.grid = (h,w).

    Args:
        dim: width C. heads: heads H. window: side length s. alpha: fraction of low heads, rounded
            down. bias: on q, k, v.
    """

    def __init__(
        self, dim: int, heads: int, *, window: int = 2, alpha: float = 0.5, bias: bool = False
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ArgumentError("heads", f"a divisor of dim={dim}", heads)
        if window < 1:
            raise ArgumentError("window", "at least 1", window)
        if not 0 <= alpha <= 1:
            raise ArgumentError("alpha", "a fraction between 0 and 1", alpha)
        self.dim, self.window = dim, window
        self.low_heads = heads if window == 1 else int(heads * alpha)
        self.high_heads = heads - self.low_heads
        low, high = (n * (dim // heads) for n in (self.low_heads, self.high_heads))
        if low:
            self.low_q = nn.Linear(dim, low, bias=bias)
            self.low_kv = nn.Linear(dim, 2 * low, bias=bias)
            self.low_proj = nn.Linear(low, low)
        if high:
            self.high_qkv = nn.Linear(dim, 3 * high, bias=bias)
            self.high_proj = nn.Linear(high, high)

    def forward(self, x: Tensor, call: Call = Call()) -> Tensor:
        """Noncausal; padded cells of call.padding are hidden and left out of the means."""
        check_tokens(x, self.dim, call)
        tiling = Tiling(image_sides(call, x.shape[1], "hilo"), (self.window, self.window))
        x = real_tokens(x, call.padding)
        parts = []
        if self.high_heads:
            parts.append(self._high(x, tiling, call))
        if self.low_heads:
            parts.append(self._low(x, tiling, call))
        return torch.cat(parts, -1)

    def _high(self, x: Tensor, tiling: Tiling, call: Call) -> Tensor:
        q, k, v = self.high_qkv(x).chunk(3, -1)
        return self.high_proj(attend_in_tiles(q, k, v, self.high_heads, tiling, call))

    def _low(self, x: Tensor, tiling: Tiling, call: Call) -> Tensor:
        real = tiling.real(call.padding, x)
        pooled = tiling.means(x, real)  # (B,T,C)
        q = split_heads(self.low_q(x), self.low_heads)
        k, v = (split_heads(part, self.low_heads) for part in self.low_kv(pooled).chunk(2, -1))
        seen = None if real is None else real.any(-1)
        inner = Call(padding=seen, query_padding=call.padding, scale=call.scale)
        return self.low_proj(join_heads(attend(q, k, v, inner, Scored()).output))


def convert(config: Mapping[str, Any], state: Mapping[str, Any]) -> HiLo:
    """A HiLo layer with the authors' weights."""
    module = HiLo(
        config["dim"],
        config["num_heads"],
        window=config.get("window_size", 2),
        alpha=config.get("alpha", 0.5),
        bias=config.get("qkv_bias", False),
    )
    spelled = {"l_": "low_", "h_": "high_"}
    module.load_state_dict({spelled[name[:2]] + name[2:]: t for name, t in state.items()})
    return module


def _replay(case: Mapping[str, Any]) -> dict[str, Any]:
    inputs = case["inputs"]
    module = convert(case["config"], case["state_dict"])
    return {"y": module(inputs["x"], Call(grid=(int(inputs["H"]), int(inputs["W"]))))}


def _as_window(part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of the window attention that a HiLo with one kind of heads coincides with."""
    if part == "low":
        qkv = torch.cat([state["low_q.weight"], state["low_kv.weight"]])
    else:
        qkv = state["high_qkv.weight"]
    names = {f"proj.{n}": state[f"{part}_proj.{n}"] for n in ("weight", "bias")}
    return {"qkv.weight": qkv, **names}


HILO = Card(
    name="hilo",
    kind="layer",
    build=HiLo,
    papers=(Paper("2205.13213", "Fast Vision Transformers with HiLo Attention", 2022),),
    family="pooled",
    patterns=("noncausal self",),
    grids=(2,),
    cost=Cost(time=2, state="none"),
    claim=Claim(
        "reads digits as well as softmax attention with a fraction of its pairs",
        "regard compare --task digits --mechanisms 'softmax,hilo(alpha=0.5)'",
    ),
    example=Example(grid=(5, 6), options={"alpha": 0.75}),
    limits=(
        Limit(
            {"window": 1},
            "window_attention",
            {"window": 6, "bias": False},
            weights=lambda state: _as_window("low", state),
        ),
        Limit(
            {"window": 6, "alpha": 0.0},
            "window_attention",
            {"window": 6, "bias": False},
            weights=lambda state: _as_window("high", state),
        ),
    ),
    goldens=(Golden("154_hilo.pt", _replay, "ziplab/LITv2", "7501c86"),),
    convert=convert,
    deviations=(
        "sides that the window does not divide are served, by smaller windows at the border",
    ),
)
