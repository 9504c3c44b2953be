r"""Channel attention (DaViT): channels attend to channels, so every token is read at linear cost.

    A_g = softmax(s q_g^T k_g)        o_g = v_g A_g^T        x: (B,N,C)  q_g, k_g, v_g: (B,N,C/G)

In each of G channel groups A_g (C/G,C/G) weighs channels against channels, its rows sum to one, and
s = 1/sqrt(C/G). The product q_g^T k_g sums over all N tokens: `dynamic_scale` takes s = 1/sqrt(N)
instead (Florence-2), so that logits do not grow with the image. DaViT alternates it with attention
within windows (`window_attention`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from regard.core.boundary import check_tokens, refuse
from regard.core.call import Call
from regard.core.card import Card, Claim, Cost, Golden, Paper
from regard.core.errors import ArgumentError
from regard.layers.attention import join_heads, real_tokens, split_heads
from regard.layers.window_attention import davit_block, within


class ChannelAttention(nn.Module):
    """Attention between the channels of each group, (B,N,C) -> (B,N,C), for any N.

    Args:
        dim: width C. heads: channel groups G. dynamic_scale: 1/sqrt(N) instead of 1/sqrt(C/G).
            bias: on q, k, v.
    """

    def __init__(
        self, dim: int, heads: int, *, dynamic_scale: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ArgumentError("heads", f"a divisor of dim={dim}", heads)
        self.dim, self.heads, self.dynamic_scale = dim, heads, dynamic_scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, call: Call = Call()) -> Tensor:
        """Noncausal; padded tokens do not take part."""
        check_tokens(x, self.dim, call)
        refuse(call, "channel_attention", "mask")
        qkv = real_tokens(self.qkv(real_tokens(x, call.padding)), call.padding)
        q, k, v = (split_heads(part, self.heads) for part in qkv.chunk(3, -1))  # (B,G,N,C/G)
        weights = ((q * self._scale(x, call)).transpose(-1, -2) @ k).softmax(-1)
        return self.proj(join_heads(v @ weights.transpose(-1, -2)))

    def _scale(self, x: Tensor, call: Call) -> float | Tensor:
        if call.scale is not None:
            return call.scale
        if not self.dynamic_scale:
            return (self.dim // self.heads) ** -0.5
        if call.padding is None:
            return max(x.shape[1], 1) ** -0.5
        return call.padding.sum(-1).clamp_min(1).to(x.dtype)[:, None, None, None] ** -0.5


def convert(config: Mapping[str, Any], state: Mapping[str, Any]) -> ChannelAttention:
    """A channel attention with the authors' weights.

    DaViT's own code computes softmax(k^T v) q, so its k, v, q are our q, k, v; the later form,
    whose config has `dynamic_scale`, names them as we do.
    """
    later, dim = "dynamic_scale" in config, config["dim"]
    module = ChannelAttention(
        dim,
        config["num_heads"],
        dynamic_scale=config.get("dynamic_scale", False),
        bias="qkv.bias" in state,
    )
    turns = {name: -dim if name.startswith("qkv.") and not later else 0 for name in state}
    module.load_state_dict({name: state[name].roll(turns[name], 0) for name in state})
    return module


def _replay(case: Mapping[str, Any]) -> dict[str, Any]:
    return {"y": convert(case["config"], case["state_dict"])(case["inputs"]["x"])}


def _replay_block(case: Mapping[str, Any]) -> dict[str, Any]:
    return davit_block(case, convert(case["config"], within(case["state_dict"], "attn.")))


CHANNEL_ATTENTION = Card(
    name="channel_attention",
    kind="layer",
    build=ChannelAttention,
    papers=(
        Paper("2204.03645", "DaViT: Dual Attention Vision Transformers", 2022),
        Paper(
            "2311.06242",
            "Florence-2: Advancing a Unified Representation for a Variety of Vision Tasks",
            2023,
        ),
    ),
    family="free",
    patterns=("noncausal self",),
    grids=(1, 2, 3),
    cost=Cost(time=1, state="none"),
    claim=Claim(
        "reads digits through sums over all tokens, at linear cost",
        "regard compare --task digits --mechanisms softmax,channel_attention",
    ),
    goldens=(
        Golden("80_channel_attention.pt", _replay, "dingmyu/davit", "fc79470"),
        Golden(
            "80_channel_attention_v2.pt",
            _replay,
            "huggingface/pytorch-image-models",
            "timm-1.0.31",
        ),
        Golden("80_channel_block.pt", _replay_block, "dingmyu/davit", "fc79470"),
    ),
    convert=convert,
)
