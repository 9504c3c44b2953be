r"""Selective self-attention: a temperature per query sharpens its row, a factor per token weighs
its value.

    s_ij = tau_q(x_i, n_i) q_i . k_j / sqrt(D)        v_j -> tau_v(x_j, n_j) v_j

    tau(x, n) = tanh(w . GELU(W x)) + 1 + slope · ln n        x: (B,N,C)  tau: (B,heads,N,1)

W is the query's (value's) own projection, w starts at zero. n is the token's position from 1 under
a causal mask, else the number of real keys. The slope is one learned number per layer: "sigmoid",
sigma(alpha), as in the paper; "double_exp", exp(-exp(beta)), as in the released code, both started
at the released 0.0113; "linear", beta itself, started at 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.call import Call
from regard.core.card import Card, Claim, Cost, Golden, Limit, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mask import Both, Causal, Mask
from regard.features.rotary import Style, rotary_angles, rotate
from regard.layers.attention import Attention, split_heads

Slope = Literal["sigmoid", "double_exp", "linear"]
_START: dict[str, float] = {
    "sigmoid": -math.log(math.exp(math.exp(1.5)) - 1),
    "double_exp": 1.5,
    "linear": 1e-5,
}


class Temperature(nn.Module):
    """tau of tokens whose projections are given.

    Args:
        width: channels of the projection. heads: temperatures per token. slope: of the position
            part, None = none. token: whether there is a token part.
    """

    def __init__(self, width: int, heads: int, slope: Slope | None, token: bool) -> None:
        super().__init__()
        if slope is not None and slope not in _START:
            raise ArgumentError("slope", f"None or one of {', '.join(_START)}", slope)
        self.kind = slope
        self.rate = None if slope is None else nn.Parameter(torch.tensor(_START[slope]))
        self.token = nn.Linear(width, heads, bias=False) if token else None
        if self.token is not None:
            nn.init.zeros_(self.token.weight)

    def forward(self, projected: Tensor, count: Tensor) -> Tensor:
        """(B,heads or 1,N,1) from projections (B,N,width) and counts n (B or 1,N), at least 1."""
        tau = torch.ones_like(projected[..., :1])
        if self.rate is not None:
            tau = tau + self.slope(self.rate) * count.to(tau.dtype).log()[..., None]
        if self.token is not None:
            tau = tau + self.token(F.gelu(projected)).tanh()
        return tau.transpose(1, 2)[..., None]

    def slope(self, rate: Tensor) -> Tensor:
        """The factor on ln n."""
        if self.kind == "sigmoid":
            return rate.sigmoid()
        return torch.exp(-rate.exp()) if self.kind == "double_exp" else rate


class SSA(Attention):
    """Softmax attention with temperatures, (B,N,C) -> (B,N,C).

    Args:
        dim: width C. heads: query heads. slope: parametrisation of the position part, None = none.
            token: the part that reads the token. values: factors on values too. kv_heads, rope,
            bias: as in Attention. rope_width: channels of a head that rotate (default all).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        slope: Slope | None = "sigmoid",
        token: bool = True,
        values: bool = True,
        kv_heads: int | None = None,
        rope: Style | None = None,
        rope_width: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, kv_heads=kv_heads, rope=rope, bias=bias)
        self.rope_width = self.head_dim if rope_width is None else rope_width
        self.query_temperature = Temperature(heads * self.head_dim, heads, slope, token)
        self.value_temperature = (
            Temperature(self.kv_heads * self.head_dim, self.kv_heads, slope, token)
            if values
            else None
        )

    def heads_in(self, x: Tensor, context: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v with the temperatures in q and v, so that a cache needs to know nothing."""
        queries, keys = call.positions(x.shape[1], context.shape[1], x.device)
        own, others = _counts(call, queries, keys)
        projected, values = self.q_proj(x), self.v_proj(context)
        q = self.turned(split_heads(projected, self.heads), queries)
        k = self.turned(split_heads(self.k_proj(context), self.kv_heads), keys)
        v = split_heads(values, self.kv_heads)
        if self.value_temperature is not None:
            v = v * self.value_temperature(values, others)
        return q * self.query_temperature(projected, own), k, v

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B,H,N,D) with its first rope_width channels rotated to their positions."""
        if self.rope is None:
            return x
        angles = rotary_angles(positions, self.rope_width)[:, None]
        first = rotate(x[..., : self.rope_width], angles, self.rope)
        return torch.cat([first, x[..., self.rope_width :]], -1)


def _counts(call: Call, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """n of each query (B or 1,N) and key (B or 1,M)."""
    if _looks_back(call.mask):
        return (queries + 1).clamp_min(1), (keys + 1).clamp_min(1)
    if call.padding is None:
        seen = keys.new_full((1, 1), max(keys.shape[1], 1))
    else:
        seen = call.padding.sum(-1, keepdim=True).clamp_min(1)
    return seen.expand(-1, queries.shape[1]), seen.expand(-1, keys.shape[1])


def _looks_back(mask: Mask | None) -> bool:
    if isinstance(mask, Both):
        return _looks_back(mask.left) or _looks_back(mask.right)
    return isinstance(mask, Causal)


def convert(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> SSA:
    """The layer with the weights of a released CausalSelfAttention (position part only).

    Raises:
        UnsupportedError: a rotary base other than 10000.
    """
    gpt2 = "c_attn.weight" in state
    if config.get("rope_base", 10000) != 10000:
        raise UnsupportedError("ssa", f"rotary base {config['rope_base']}; only 10000")
    groups = config["n_head"] if gpt2 else config["n_query_groups"]
    layer = SSA(
        config["n_embd"],
        config["n_head"],
        slope="linear" if "no_func" in config["variant"] else "double_exp",
        token=False,
        values=False,
        kv_heads=groups,
        rope=None if gpt2 else "half",
        rope_width=config.get("rope_n_elem"),
        bias=config["bias"],
    ).to(state["beta"].dtype)
    own = {"query_temperature.rate": state["beta"]}
    for name, x in state.items():
        stem, _, kind = name.partition(".")
        if stem in ("c_attn", "attn"):
            own |= _unpacked(x, kind, 1 if gpt2 else groups, layer)
        elif stem in ("c_proj", "proj"):
            own[f"o_proj.{kind}"] = x
    layer.load_state_dict(own)
    return layer


def _unpacked(packed: Tensor, kind: str, groups: int, layer: SSA) -> dict[str, Tensor]:
    """Rows of a packed projection, per group its queries, keys and values, under our names."""
    shared = layer.kv_heads * layer.head_dim // groups
    sizes = (layer.heads * layer.head_dim // groups, shared, shared)
    parts = packed.unflatten(0, (groups, -1)).split(sizes, 1)
    return {f"{p}_proj.{kind}": x.flatten(0, 1) for p, x in zip("qkv", parts, strict=True)}


def _replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    layer = convert(case["config"], case["state_dict"])
    return {"y": layer(case["inputs"]["x"], Call(mask=Causal()))}


def _neutral(layer: SSA) -> None:
    for name, parameter in layer.named_parameters():
        if name.endswith("temperature.rate"):
            nn.init.constant_(parameter, -1e4)
        elif name.endswith("token.weight"):
            nn.init.zeros_(parameter)


def _without_temperatures(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in state.items() if "_temperature." not in name}


SSA_CARD = Card(
    name="ssa",
    kind="layer",
    build=SSA,
    papers=(
        Paper(
            "2411.12892",
            "Selective Attention: Enhancing Transformer through Principled Context Control",
            2024,
        ),
    ),
    family="scored",
    patterns=("noncausal self", "causal self", "noncausal cross", "causal cross"),
    grids=(1, 2, 3),
    cost=Cost(time=2, state="keys"),
    claim=Claim(
        "recalls what softmax recalls, with rows as sharp as each query wants them",
        "regard compare --task recall --mechanisms softmax,ssa",
    ),
    limits=(Limit({}, "static_emb_qk", prepare=_neutral, weights=_without_temperatures),),
    goldens=(
        Golden(
            "115_ssa_position_temperature.pt",
            _replay,
            "umich-sota/selective_attention: lit_gpt/gpt_2_PTS.py, model_finetune_att.py, "
            "model_finetune_att_no_func.py: CausalSelfAttention",
            "4ea6520",
        ),
    ),
    convert=convert,
    deviations=(
        "the token part's map is not published; w . GELU(W x) with the projection's own W",
        "n follows absolute positions, so that a cached call sharpens like a full one",
    ),
)
