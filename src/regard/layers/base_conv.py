r"""BaseConv: a gated causal convolution; tokens mix by their distance alone, never by content.

    y = (W u + b) ⊙ (h * u + c) + u        (h * u)_t = sum_{j<K} h_j u_{t-j}        u: (B,N,C)

h (C,K) is one filter per channel: K learned taps, or (`implicit`) a small network of the position
j/(K-1), with 1 added to h_0 and without c. With `activation`, SiLU is applied to both factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.boundary import check_tokens, refuse
from regard.core.call import Call
from regard.core.card import Card, Claim, Cost, Example, Golden, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mask import Causal
from regard.core.recurrent import is_causal
from regard.features.causal_conv import ImplicitTaps, LearnedTaps, Recent, carried_conv
from regard.layers.attention import real_tokens

TITLE = "Zoology: Measuring and Improving Recall in Efficient Language Models"


class BaseConv(nn.Module):
    """Gated causal depthwise convolution, (B,N,C) -> (B,N,C), its residual included.

    Args:
        dim: width C. heads: not used, every channel is a head of its own. kernel: taps K.
            implicit: taps from a network of their position, for long filters. activation: SiLU on
            both factors.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        kernel: int = 3,
        implicit: bool = False,
        activation: bool = False,
    ) -> None:
        super().__init__()
        if kernel < 1:
            raise ArgumentError("kernel", "at least 1 tap", kernel)
        self.dim, self.kernel, self.activation = dim, kernel, activation
        self.projection = nn.Linear(dim, dim)
        self.taps = (ImplicitTaps if implicit else LearnedTaps)(dim, kernel)

    def forward(self, x: Tensor, call: Call = Call(mask=Causal())) -> Tensor:
        """(B,N,C) -> (B,N,C), in causal calls only; call.padding may leave out any token."""
        return self.step(x, None, call)[0]

    def step(
        self, x: Tensor, state: Recent | None, call: Call = Call(mask=Causal())
    ) -> tuple[Tensor, Recent]:
        """New tokens x (B,T,C) after `state` (None at the start) -> (B,T,C) and the state after
        them.
        """
        check_tokens(x, self.dim, call)
        if not is_causal(call, "base_conv"):
            raise UnsupportedError("base_conv", "it looks back only, so it needs mask=Causal()")
        refuse(call, "base_conv", "scale")
        call = call.of_self()
        x = real_tokens(x, call.padding)
        mixed, after = carried_conv(x, self.taps, state, call.padding)
        gate = self.projection(x)
        if self.activation:
            gate, mixed = F.silu(gate), F.silu(mixed)
        return real_tokens(gate * mixed + x, call.query_padding), after


def from_authors(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> BaseConv:
    """Their BaseConv, short or long (kernel_size -1: the filter is as long as l_max), as ours."""
    size = config.get("kernel_size", 3)
    size = size[config["layer_idx"]] if isinstance(size, list) else size
    implicit = size == -1 and config.get("implicit_long_conv", True)
    ours = BaseConv(
        config["d_model"],
        kernel=config["l_max"] if size == -1 else size,
        implicit=implicit,
        activation=config.get("use_act", False),
    ).to(state["projection.weight"].dtype)
    renamed = {"projection.": "projection.", "conv.mlp.": "taps.network."}
    weights = {
        key.replace(theirs, own): value
        for theirs, own in renamed.items()
        for key, value in state.items()
        if key.startswith(theirs)
    }
    if "conv.filter" in state:  # a learned long filter, to which the token itself is added
        filters = state["conv.filter"].clone()
        filters[:, 0] += 1
        weights |= {"taps.weight": filters, "taps.bias": torch.zeros(len(filters))}
    elif not implicit:
        weights["taps.weight"] = state["conv.conv.weight"][:, 0].flip(-1)
        weights["taps.bias"] = state["conv.conv.bias"]
    ours.load_state_dict(weights)
    return ours


def _replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    layer = from_authors(case["config"], case["state_dict"])
    return {"y": layer(case["inputs"]["x"])}


BASE_CONV = Card(
    name="base_conv",
    kind="layer",
    build=BaseConv,
    papers=(Paper("2312.04927", TITLE, 2023),),
    family="free",
    patterns=("causal self",),
    cost=Cost(time=1, state="constant"),
    example=Example(options={"kernel": 3}),
    goldens=(
        Golden(
            "192_zoology.pt",
            _replay,
            source="HazyResearch/zoology:zoology/mixers/base_conv.py:BaseConv",
            commit="d88d6f5",
            only=lambda case: case["config"].get("cls") == "BaseConv",
        ),
    ),
    convert=from_authors,
    deviations=("a learned filter longer than the sequence does not wrap round into the future",),
    claim=Claim(
        "fails at recall where attention of the same width solves it",
        "regard compare --task recall --mechanisms softmax,base_conv",
    ),
)
