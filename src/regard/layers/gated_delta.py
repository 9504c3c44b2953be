r"""Gated DeltaNet: the delta rule in a memory that also fades, at a rate each token chooses.

    S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t / sqrt(D)
    a_t = exp(-e^A softplus(W_a x_t + b))        beta_t = sigmoid(W_b x_t)        x: (B,N,C)
    y = W_o concat_h (rms(o_h) ⊙ SiLU(W_z x)_h)        q, k, v as in `delta_net`

a and beta are numbers per head and token, A and b (H,). a near 0 clears the memory at once, beta
edits one key; without decay and gate (gate=False) this is `delta_net`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.card import Card, Claim, Cost, Example, Limit, Paper
from regard.core.delta import DeltaForm
from regard.core.recurrent import widened
from regard.layers.attention import join_heads
from regard.layers.delta_net import DeltaNet


class GatedDelta(DeltaNet):
    """Gated DeltaNet layer, causal, (B,N,C) -> (B,N,C).

    Args:
        dim, heads, head_dim, conv, chunk: as in `delta_net`. gate: multiply by SiLU(W_z x).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        conv: int = 4,
        gate: bool = True,
        chunk: int = 32,
        form: DeltaForm = "auto",
    ) -> None:
        super().__init__(dim, heads, head_dim=head_dim, conv=conv, chunk=chunk, form=form)
        self.decay_proj = nn.Linear(dim, heads, bias=False)
        self.rate_log = nn.Parameter(torch.empty(heads).uniform_(1.0, 16.0).log())
        start = torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.decay_bias = nn.Parameter(start.expm1().log())  # softplus of it is `start`
        width = heads * self.head_dim
        self.gate_proj = nn.Linear(dim, width, bias=False) if gate else None

    def rates(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """beta and the log decay, (B,H,N), of x (B,N,C)."""
        beta, _ = super().rates(x)
        speed = F.softplus(widened(self.decay_proj(x)) + widened(self.decay_bias))
        return beta, -(widened(self.rate_log).exp() * speed).mT

    def heads_out(self, o: Tensor, x: Tensor) -> Tensor:
        o = join_heads(self.norm(o))
        return self.o_proj(o if self.gate_proj is None else o * F.silu(self.gate_proj(x)))


def _lasting(layer: GatedDelta) -> None:
    with torch.no_grad():
        layer.rate_log.fill_(-math.inf)


def _ungated(weights: Mapping[str, Any]) -> dict[str, Any]:
    own = ("decay_proj.weight", "rate_log", "decay_bias")
    return {name: weight for name, weight in weights.items() if name not in own}


GATED_DELTA = Card(
    name="gated_delta",
    kind="layer",
    build=GatedDelta,
    papers=(Paper("2412.06464", "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2024),),
    family="recurrent",
    patterns=("causal self",),
    cost=Cost(time=1, state="constant"),
    claim=Claim(
        "recalls more than decayed linear attention from a state of the same size",
        "regard compare --task recall --mechanisms tnl,gated_delta",
    ),
    example=Example(options={"chunk": 5}),
    limits=(Limit(options={"gate": False}, other="delta_net", weights=_ungated, prepare=_lasting),),
    forms=("form", ("chunk", "scan")),
    deviations=("values are as wide as keys; the paper's are twice as wide",),
)
