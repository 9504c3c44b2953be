r"""TNL: decayed linear attention between SiLU projections, with a norm for a normaliser and a gate.

    q, k, v = SiLU(W_q x), SiLU(W_k x), SiLU(W_v x)        o = lightning(q, k, v)
    y = W_o (norm(concat_h o_h) ⊙ sigmoid(W_2 W_1 x))        x: (B,N,C)  W_1: C -> D  W_2: D -> C

norm is a LayerNorm over all C channels. The decay of a head shrinks with call.layer of call.layers
(`regard.operators.lightning`). This is the module published with the kernels; the language model's
layer, with a linear gate and without an activation on v, is `transnormer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.call import Call
from regard.core.card import Card, Claim, Cost, Golden, Paper
from regard.core.errors import UnsupportedError
from regard.core.mask import Causal
from regard.core.recurrent import Form
from regard.layers.attention import Attention, join_heads
from regard.operators.lightning import layer_slopes


class GatedLightning(Attention):
    """Attention layer around `lightning`: y = W_o (norm(o) ⊙ gate(x)); a subclass sets `norm` and
    `gate`, both (B,N,·) -> (B,N,H*D).
    """

    norm: nn.Module
    gate: nn.Module

    def forward(self, x: Tensor, call: Call = Call(), context: Tensor | None = None) -> Tensor:
        """x (B,N,C) -> (B,N,C), causal self-attention."""
        if context is not None:
            raise UnsupportedError(type(self).__name__, "its decay needs queries and keys of one x")
        return super().forward(x, call)

    def heads_out(self, o: Tensor, x: Tensor, call: Call) -> Tensor:
        return self.o_proj(self.norm(join_heads(o)) * self.gate(x))


class Tnl(GatedLightning):
    """TNL attention with a low-rank gate.

    Args:
        dim: C. heads: H, D = C/H. bias: on every projection.
    """

    def __init__(
        self, dim: int, heads: int, *, bias: bool = False, chunk: int = 64, form: Form = "auto"
    ) -> None:
        super().__init__(dim, heads, "lightning", {"chunk": chunk, "form": form}, bias=bias)
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Sequential(
            nn.Linear(dim, self.head_dim, bias=bias),
            nn.Linear(self.head_dim, dim, bias=bias),
            nn.Sigmoid(),
        )

    def heads_in(self, x: Tensor, context: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads_in(x, context, call)
        return F.silu(q), F.silu(k), F.silu(v)


def convert(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Tnl:
    """Our layer with the authors' weights."""
    ours = Tnl(config["embed_dim"], config["num_heads"], bias=config.get("bias", False))
    ours.load_state_dict({n.replace("output_gate.", "gate."): w for n, w in weights.items()})
    return ours


def replay(case: Mapping[str, Any]) -> dict[str, Any]:
    """The layer's output and its decay slopes."""
    config = case["config"]
    layer, layers = config["layer_idx"], config["num_layers"]
    call = Call(mask=Causal(), layer=layer, layers=layers)
    slopes = torch.tensor(layer_slopes(config["num_heads"], layer, layers))
    y = convert(config, case["state_dict"])(case["inputs"]["x"], call)
    return {"y": y, "slope_rate": slopes[:, None, None]}


TNL = Card(
    name="tnl",
    kind="layer",
    build=Tnl,
    papers=(
        Paper(
            "2405.17381",
            "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
            2024,
        ),
    ),
    family="recurrent",
    patterns=("causal self",),
    cost=Cost(time=1, state="constant"),
    claim=Claim(
        "keeps the same speed per token at every length",
        "regard compare --task recall --mechanisms softmax,tnl",
    ),
    forms=("form", ("parallel", "chunk", "scan")),
    goldens=(
        Golden(
            file="28_tnl_attention.pt",
            replay=replay,
            source="OpenNLPLab/lightning-attention:examples/module/tnl_attn.py",
            commit="d15c385",
        ),
    ),
    convert=convert,
    deviations=(
        "the slopes are the code's, 2^(-8h/H) (1 - l/(L-1) + 1e-5), not the text's 8h/H (1 - l/L)",
    ),
)
