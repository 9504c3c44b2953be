r"""TransNormerLLM's token mixer: decayed linear attention, an RMS norm for a normaliser, a linear
gate.

    q, k = phi(SiLU(W_q x)), phi(SiLU(W_k x))        v = W_v x        u = W_u x        x: (B,N,C)
    y = W_o (srms(concat_h lightning(q, k, v)_h) ⊙ u)        srms(o) = o / sqrt(mean o^2 + 1e-6)

phi is the learned relative encoding LRPE (`regard.features.lrpe`) in the first layer of a model and
the identity (lrpe=False) in all others: there the decay is the only position. `Sglu` is its channel
mixer, W_3 (W_1 x ⊙ W_2 x).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.call import Call
from regard.core.card import Card, Claim, Cost, Golden, Paper
from regard.core.mask import Causal
from regard.core.recurrent import Form
from regard.features.lrpe import Lrpe
from regard.layers.block import Block
from regard.layers.tnl import GatedLightning

srms_norm = partial(nn.RMSNorm, eps=1e-6, elementwise_affine=False)


class Transnormer(GatedLightning):
    """TransNormerLLM token mixer.

    Args:
        dim: C. heads: H. head_dim: D (default C/H). lrpe: learned positions, for a first layer.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        lrpe: bool = True,
        bias: bool = False,
        chunk: int = 64,
        form: Form = "auto",
    ) -> None:
        options = {"chunk": chunk, "form": form}
        super().__init__(dim, heads, "lightning", options, head_dim=head_dim, bias=bias)
        self.norm = srms_norm(heads * self.head_dim)
        self.gate = nn.Linear(dim, heads * self.head_dim, bias=bias)
        self.lrpe = Lrpe(heads, self.head_dim) if lrpe else None

    def heads_in(self, x: Tensor, context: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads_in(x, context, call)
        q, k = F.silu(q), F.silu(k)
        if self.lrpe is None:
            return q, k, v
        positions, _ = call.positions(x.shape[1], x.shape[1], x.device)
        return *self.lrpe(q, k, positions), v


class Sglu(nn.Module):
    """Simple gated unit W_3 (W_1 x ⊙ W_2 x), (B,N,C) -> (B,N,C), without an activation."""

    def __init__(self, dim: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.l1, self.l2 = (nn.Linear(dim, hidden, bias=bias) for _ in range(2))
        self.l3 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor, call: Call = Call()) -> Tensor:
        """Every token on its own; the call is not needed."""
        return self.l3(self.l1(x) * self.l2(x))


def convert(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Block:
    """Our block (norm, mixer, norm, Sglu) with the authors' decoder layer's weights."""
    heads, dim = config["num_heads"], config["embed_dim"]
    lrpe, bias = config["linear_use_lrpe"], "token_mixer.out_proj.bias" in weights
    width = config["hidden_dim"] // heads
    mixer = Transnormer(dim, heads, head_dim=width, lrpe=lrpe, bias=bias)
    ours = Block(dim, mixer, Sglu(dim, config["glu_dim"], bias=bias), norm=srms_norm)
    mine: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        part, kind = name.rsplit(".", 1)
        if part == "token_mixer.qkvu_proj":
            for ours_name, rows in zip(
                ("q_proj", "k_proj", "v_proj", "gate"), tensor.chunk(4), strict=True
            ):
                mine[f"mixer.{ours_name}.{kind}"] = rows
        elif kind == "theta":
            mine["mixer.lrpe.theta"] = tensor.flatten(1)
        else:
            part = part.replace("token_mixer.out_proj", "mixer.o_proj")
            mine[f"{part.replace('channel_mixer', 'feed_forward')}.{kind}"] = tensor
    ours.load_state_dict(mine)
    return ours


def replay(case: Mapping[str, Any]) -> dict[str, Any]:
    """Mixer with and without padding, the whole layer, and inference in two steps with states."""
    config, inputs = case["config"], case["inputs"]
    block, x = convert(config, case["state_dict"]), inputs["x"]
    call = Call(mask=Causal(), layer=config["layer_idx"], layers=config["num_layers"])
    padding = inputs["attn_padding_mask"].bool()
    first, prefill = block.mixer.step(x[:, :-3], None, call)
    rest, last = block.mixer.step(x[:, -3:], prefill, call)
    return {
        "y_attn": block.mixer(x, call),
        "y_attn_padded": block.mixer(x, call.but(padding=padding)),
        "y_layer": block(x, call),
        "kv_prefill": prefill.inner.content,
        "kv_last": last.inner.content,
        "y_inference": torch.cat([first, rest], 1),
    }


TRANSNORMER = Card(
    name="transnormer",
    kind="layer",
    build=Transnormer,
    papers=(
        Paper(
            "2307.14995",
            "TransNormerLLM: A Faster and Better Large Language Model with Improved TransNormer",
            2023,
        ),
    ),
    family="recurrent",
    patterns=("causal self",),
    cost=Cost(time=1, state="constant"),
    claim=Claim(
        "keeps the same speed per token at every length",
        "regard compare --task recall --mechanisms softmax,transnormer",
    ),
    forms=("form", ("parallel", "chunk", "scan")),
    goldens=(
        Golden(
            file="111_transnormerllm.pt",
            replay=replay,
            source="OpenNLPLab/TransNormerLLM:modeling_transnormer.py",
            commit="stored copy 5803211360",
        ),
    ),
    convert=convert,
    deviations=("no time passes in padded tokens, where the published code lets memory fade",),
)
