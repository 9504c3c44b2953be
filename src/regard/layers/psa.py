r"""Polarized self-attention: a gate per channel and a gate per pixel, each pooled from the whole
image.

    channel:  g = σ(LN(W_z sum_j softmax_j(W_q x_j) W_v x_j))                      (B,1,C)
    spatial:  h_i = σ(softmax_c(mean_j W_q' x_j) . W_v' x_i)                       (B,N,1)
    parallel: y = g ⊙ x + h ⊙ x          sequential: y = h(g ⊙ x) ⊙ (g ⊙ x)

x: (B,N,C); W_q: C -> 1, all other W: C -> C/2 or back. No pair of tokens is ever scored.

The released code is another method, `variant="official"`: W_q, W_v, W_q', W_v' have no bias; the
mean of W_q' x is not normalised; in parallel the spatial product is normalised over pixels
(h = σ(softmax_i(·))) and g lacks LN; in sequence the values are normalised over pixels first and
W_z is C/2 -> C/8, LN, ReLU, C/8 -> C.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.core.boundary import check_tokens, refuse
from regard.core.call import Call
from regard.core.card import Card, Claim, Cost, Golden, Paper
from regard.core.errors import ArgumentError
from regard.core.weights import Softmax
from regard.layers.attention import real_tokens

Variant = Literal["paper", "official"]
Order = Literal["parallel", "sequential"]


class PSA(nn.Module):
    """Polarized self-attention, (B,N,C) -> (B,N,C), blind to where tokens stand.

    Args:
        dim: width C, even. heads: not used, there are two gates. variant: formulas of the paper or
            of the released code. order: both gates on x and added, or one after the other.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        variant: Variant = "paper",
        order: Order = "parallel",
    ) -> None:
        super().__init__()
        if variant not in ("paper", "official"):
            raise ArgumentError("variant", "'paper' or 'official'", variant)
        if order not in ("parallel", "sequential"):
            raise ArgumentError("order", "'parallel' or 'sequential'", order)
        if dim % 2 or dim < 8:
            raise ArgumentError("dim", "an even width of 8 or more", dim)
        self.dim, self.variant, self.order = dim, variant, order
        half, bias = dim // 2, variant == "paper"
        self.channel_query = nn.Linear(dim, 1, bias=bias)
        self.channel_value = nn.Linear(dim, half, bias=bias)
        self.channel_out = _channel_out(dim, variant, order)
        self.spatial_query = nn.Linear(dim, half, bias=bias)
        self.spatial_value = nn.Linear(dim, half, bias=bias)

    def forward(self, x: Tensor, call: Call = Call()) -> Tensor:
        """Noncausal; padded tokens do not take part."""
        check_tokens(x, self.dim, call)
        refuse(call, "psa", "mask", "scale")
        x = real_tokens(x, call.padding)
        real = call.padding
        if real is None:
            real = torch.ones(1, x.shape[1], dtype=torch.bool, device=x.device)
        gated = self.channel_gate(x, real) * x
        if self.order == "sequential":
            return self.spatial_gate(gated, real) * gated
        return gated + self.spatial_gate(x, real) * x

    def channel_gate(self, x: Tensor, real: Tensor) -> Tensor:
        """Factors (B,1,C) in (0,1) from x (B,N,C) and its real tokens (B or 1,N)."""
        weights = _over_tokens(self.channel_query(x).transpose(1, 2), real)  # (B,1,N)
        return torch.sigmoid(self.channel_out(weights @ self.channel_value(x)))

    def spatial_gate(self, x: Tensor, real: Tensor) -> Tensor:
        """Factors (B,N,1) in (0,1) from x (B,N,C) and its real tokens (B or 1,N)."""
        count = real.sum(-1, keepdim=True).clamp_min(1)[..., None]
        pooled = (self.spatial_query(x) * real[..., None]).sum(1, keepdim=True) / count  # (B,1,C/2)
        values = self.spatial_value(x).transpose(1, 2)  # (B,C/2,N)
        if self.variant == "paper":
            product = pooled.softmax(-1) @ values
        elif self.order == "parallel":
            product = _over_tokens(pooled @ values, real)
        else:
            product = pooled @ _over_tokens(values, real)
        return torch.sigmoid(product).transpose(1, 2)


def _over_tokens(scores: Tensor, real: Tensor) -> Tensor:
    """Softmax of (B,K,N) over real tokens (B or 1,N)."""
    visible = real[:, None]
    return Softmax()(scores, visible, visible.sum(-1, keepdim=True))


def _channel_out(dim: int, variant: Variant, order: Order) -> nn.Module:
    half = dim // 2
    if variant == "paper":
        return nn.Sequential(nn.Linear(half, dim), nn.LayerNorm(dim))
    if order == "parallel":
        return nn.Linear(half, dim, bias=False)
    narrow = half // 4
    return nn.Sequential(
        nn.Linear(half, narrow), nn.LayerNorm(narrow), nn.ReLU(), nn.Linear(narrow, dim)
    )


_OFFICIAL = {
    "conv_q_right.": "channel_query.",
    "conv_v_right.": "channel_value.",
    "conv_up.": "channel_out.",
    "conv_q_left.": "spatial_query.",
    "conv_v_left.": "spatial_value.",
}
_PAPER_FORM = {
    "ch_wq.": "channel_query.",
    "ch_wv.": "channel_value.",
    "ch_wz.": "channel_out.0.",
    "ln.": "channel_out.1.",
    "sp_wq.": "spatial_query.",
    "sp_wv.": "spatial_value.",
}


def convert(config: Mapping[str, Any], state: Mapping[str, Any], order: Order | None = None) -> PSA:
    """A layer with the weights of the released code (inplanes = planes), or of the port that
    follows the paper, whose two orders have the same parameters: `order` tells which.
    """
    official = "conv_q_right.weight" in state
    dim = config["inplanes"] if official else config["channel"]
    found: Order = "sequential" if "conv_up.0.weight" in state else "parallel"
    module = PSA(dim, variant="official" if official else "paper", order=order or found)
    names = _OFFICIAL if official else _PAPER_FORM
    own = {}
    for name, tensor in state.items():
        start = next(s for s in names if name.startswith(s))
        own[names[start] + name.removeprefix(start)] = (
            tensor.flatten(1) if tensor.ndim == 4 else tensor.flatten()
        )
    module.load_state_dict(own)
    return module


def _parallel(case: Mapping[str, Any]) -> dict[str, Any]:
    return _replay(case, "parallel")


def _sequential(case: Mapping[str, Any]) -> dict[str, Any]:
    return _replay(case, "sequential")


def _replay(case: Mapping[str, Any], order: Order) -> dict[str, Any]:
    x = case["inputs"]["x"]
    y = convert(case["config"], case["state_dict"], order)(x.flatten(2).transpose(1, 2))
    return {"y": y.transpose(1, 2).unflatten(2, x.shape[2:])}


_OWN = ("DeLightCMU/PSA", "20e307a")
_PORT = ("xmu-xiaoma666/External-Attention-pytorch", "d75848e")

PSA_CARD = Card(
    name="psa",
    kind="layer",
    build=PSA,
    papers=(
        Paper(
            "2107.00782",
            "Polarized Self-Attention: Towards High-quality Pixel-wise Regression",
            2021,
        ),
    ),
    family="free",
    patterns=("noncausal self",),
    grids=(1, 2, 3),
    cost=Cost(time=1, state="none"),
    claim=Claim(
        "reads digits with two gates and no pairwise score",
        "regard compare --task digits --mechanisms softmax,psa",
    ),
    goldens=(
        Golden("179_psa_p_official.pt", _parallel, *_OWN),
        Golden("179_psa_s_official.pt", _sequential, *_OWN),
        Golden("179_psa_p_paperform.pt", _parallel, *_PORT),
        Golden("179_psa_s_paperform.pt", _sequential, *_PORT),
    ),
    convert=convert,
)
