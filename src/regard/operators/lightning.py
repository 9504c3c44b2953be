r"""Lightning attention: causal linear attention without a normaliser, its memory fading at a fixed
rate per head.

    o_i = sum_{j<=i} e^{-s (i-j)} (q_i . k_j) v_j        q, k: (B,H,N,D)  v: (B,H,N,E)  s >= 0: (H,)

Computed block by block: scores inside a block, a state D x E between blocks. "alibi" slopes are
those of ALiBi times 1 - l/(L-1) + 1e-5 in layer l of the L that the call names, so that deeper
layers see further. Outputs grow like 1/(1 - e^{-s}), so a norm should follow; there is no
1/sqrt(D).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Golden, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.kernels import decayed_sum
from regard.core.mask import Causal
from regard.core.recurrent import Form, Memory, Recurrent, is_causal, recur
from regard.scores.alibi import alibi_slopes

Slopes = Literal["alibi"] | Sequence[float] | None


def lightning(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    slopes: Slopes = "alibi",
    chunk: int = 64,
    form: Form | Literal["triton"] = "auto",
    state: Memory | None = None,
) -> Result:
    """Decayed causal linear attention; slopes: by head and layer, one number per head, or None (no
    decay). form "triton" runs GPU kernels, in chunks of 16, 32 or 64.
    """
    check_qkv(q, k, v, call)
    if not is_causal(call, "lightning"):
        raise UnsupportedError("lightning", "its decay runs from past to present (mask=Causal())")
    log_decay = _log_decay(slopes, q, call)
    if form == "triton":
        return decayed_sum(q, k, v, call, log_decay=log_decay, chunk=chunk, state=state)
    method = Recurrent(log_decay, chunk=chunk)
    return recur(q, k, v, call, method, state=state, form=form)


def layer_slopes(heads: int, layer: int, layers: int) -> list[float]:
    """Slopes of `heads` heads in layer `layer` (from 0) of `layers`."""
    factor = 1.0 - layer / max(layers - 1, 1) + 1e-5
    return [factor * slope for slope in alibi_slopes(heads)]


def _log_decay(slopes: Slopes, q: Tensor, call: Call) -> Tensor | None:
    if slopes is None:
        return None
    if isinstance(slopes, str):
        if slopes != "alibi":
            raise ArgumentError("slopes", "'alibi', one number per head or None", slopes)
        slopes = layer_slopes(q.shape[1], call.layer, call.layers)
    if len(slopes) != q.shape[1] or min(slopes) < 0:
        raise ArgumentError("slopes", f"{q.shape[1]} numbers >= 0", tuple(slopes))
    return -torch.tensor(slopes, dtype=torch.float64, device=q.device)


def replay(case: Mapping[str, Any]) -> dict[str, Any]:
    """Output and gradients under an upstream gradient, and the slope tables."""
    inputs = case["inputs"]
    slopes = None if inputs["s"] is None else tuple(inputs["s"].flatten().tolist())
    leaves = [inputs[name].clone().requires_grad_() for name in ("q", "k", "v")]
    q, k, v = leaves
    o = lightning(q, k, v, Call(mask=Causal()), slopes=slopes).output
    gradients = torch.autograd.grad(o, leaves, inputs["do"])
    found: dict[str, Any] = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    if "slopes" in case["outputs"]:
        found["slopes"] = {h: torch.tensor(alibi_slopes(h)) for h in case["outputs"]["slopes"]}
    return {"o": o, **found}


LIGHTNING = Card(
    name="lightning",
    kind="operator",
    build=lightning,
    papers=(
        Paper(
            "2401.04658",
            "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large"
            " Language Models",
            2024,
        ),
    ),
    family="recurrent",
    patterns=("causal self",),
    cost=Cost(time=1, state="constant"),
    claim=Claim(
        "keeps the same speed per token at every length",
        "regard compare --task recall --mechanisms softmax,lightning",
    ),
    forms=("form", ("parallel", "chunk", "scan")),
    goldens=(
        Golden(
            file="67_lightning_attention2.pt",
            replay=replay,
            source="OpenNLPLab/lightning-attention:lightning_attn/ops/torch/linear_attention.py",
            commit="d15c385",
        ),
    ),
)
