r"""BaseConv: a gated causal convolution; tokens mix by their distance alone, never by content.

    y = (W u + b) ⊙ (h * u + c) + u        (h * u)_t = sum_{j<K} h_j u_{t-j}        u: (B,N,C)

h (C,K) is one filter per channel: K learned taps, or (`implicit`) a small network of the position
j/(K-1), with 1 added to h_0 and without c. With `activation`, SiLU is applied to both factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.boundary import check_tokens
from regard.core.call import Call
from regard.core.card import Card, Claim, Cost, Example, Golden, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mask import Causal
from regard.core.padding import front_aligned
from regard.core.recurrent import is_causal
from regard.layers.attention import real_tokens

_DIRECT = 64  # taps up to which the sum is cheaper than a Fourier transform


@dataclass(frozen=True, eq=False)
class Recent:
    """Decode state: the last K-1 real tokens (B,K-1,C), zeros before the first."""

    tokens: Tensor


class LearnedTaps(nn.Module):
    """One number per channel and distance, with a bias."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        bound = kernel**-0.5
        self.weight = nn.Parameter(torch.empty(dim, kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound))

    def forward(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Taps h (C,count) by distance, and the bias c (C,)."""
        return self.weight[:, :count], self.bias


class ImplicitTaps(nn.Module):
    """Taps computed from their relative distance by a small network; the token itself is added."""

    def __init__(self, dim: int, kernel: int, hidden: int = 16) -> None:
        super().__init__()
        self.kernel = kernel
        self.network = nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Taps h (C,count) by distance, no bias."""
        like = next(self.parameters())
        j = torch.arange(count, device=like.device, dtype=like.dtype)
        turn = 2e-4 * math.pi * j / self.kernel  # the published code has one, very slow frequency
        features = torch.stack([j / max(self.kernel - 1, 1), turn.cos(), -turn.sin()], -1)
        taps = self.network(features).T
        return torch.cat([taps[:, :1] + 1, taps[:, 1:]], 1), None


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
        call = call.of_self()
        x = real_tokens(x, call.padding)
        aligned = None if call.padding is None else front_aligned(call.padding)
        new = x if aligned is None else aligned.front(x)
        before = x[:, :0] if state is None else state.tokens
        mixed = self._convolved(torch.cat([before, new], 1))[:, before.shape[1] :]
        mixed = mixed if aligned is None else aligned.back(mixed)
        gate = self.projection(x)
        if self.activation:
            gate, mixed = F.silu(gate), F.silu(mixed)
        return real_tokens(gate * mixed + x, call.query_padding), self._recent(before, new, call)

    def _convolved(self, x: Tensor) -> Tensor:
        """Causal convolution of x (B,N,C), zeros before the first token."""
        tokens = x.shape[1]
        if tokens == 0:
            return x
        taps, bias = self.taps(min(self.kernel, tokens))
        line = x.transpose(1, 2)
        if self.kernel <= _DIRECT:
            past = F.pad(line, (taps.shape[1] - 1, 0))
            mixed = F.conv1d(past, taps.flip(-1)[:, None], groups=self.dim)
        else:
            wide = torch.promote_types(x.dtype, torch.float32)
            spectrum = torch.fft.rfft(line.to(wide), 2 * tokens)
            spectrum = spectrum * torch.fft.rfft(taps.to(wide), 2 * tokens)
            mixed = torch.fft.irfft(spectrum, 2 * tokens)[..., :tokens].to(x.dtype)
        mixed = mixed.transpose(1, 2)
        return mixed if bias is None else mixed + bias

    def _recent(self, before: Tensor, new: Tensor, call: Call) -> Recent:
        """The last K-1 real tokens; in `new` (B,T,C) padding stands last."""
        kept = self.kernel - 1
        line = F.pad(torch.cat([before, new], 1), (0, 0, kept - before.shape[1], 0))
        if call.padding is None:
            return Recent(line[:, line.shape[1] - kept :])
        index = call.padding.sum(-1, keepdim=True) + torch.arange(kept, device=line.device)
        return Recent(line.gather(1, index[..., None].expand(-1, -1, self.dim)))


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
    )
    weights = {name: value for name, value in state.items() if name.startswith("projection.")}
    if implicit:
        named = {k.removeprefix("conv.mlp."): v for k, v in state.items()}
        weights |= {f"taps.network.{k}": v for k, v in named.items() if k[0] in "02"}
    elif size == -1:  # a learned long filter, to which the token itself is added
        filters = state["conv.filter"].clone()
        filters[:, 0] += 1
        weights |= {"taps.weight": filters, "taps.bias": torch.zeros(len(filters))}
    else:
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
    papers=(Paper("2312.04927", "Zoology: Measuring and Improving Recall in Efficient LMs", 2023),),
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
    claim=Claim(
        "fails at recall where attention of the same width solves it",
        "regard compare --task recall --mechanisms softmax,base_conv",
    ),
)
