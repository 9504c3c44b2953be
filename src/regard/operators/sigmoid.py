r"""Sigmoid attention: every key is weighed on its own, so rows need not sum to one.

    o_i = sum_j sigma(e^t q_i . k_j s + b_i) v_j        q: (B,H,N,D)  k: (B,H_k,M,D)  v: (B,H_v,M,E)

s is 1/sqrt(D), t a temperature (0). The bias b_i = -ln n_i, n_i the number of keys row i may see,
makes an untrained row sum to about one; a number instead is the same for every row (the paper's is
-ln of the training length). ALiBi, if asked for, comes before the temperature. The paper trains it
with norms on q and k (`qk_norm="layer"` of the attention layer).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Golden, Limit, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.kernels import sigmoid_sum
from regard.core.mask import Causal
from regard.core.scored import Impl, attend
from regard.core.weights import Scored
from regard.scores.alibi import alibi

Divisor = Literal["count", "sqrt_count", "row", "sqrt_row"]
Decay = Literal["distance", "signed"]


@dataclass(frozen=True, eq=False)
class SigmoidWeights:
    """sigma(factor s_ij + b) / n_i^power; b None = -ln n_i. Invisible keys weigh exactly zero."""

    bias: float | None
    factor: float | Tensor = 1.0
    power: float = 0.0
    kind: Literal["additive"] = "additive"

    def __call__(self, scores: Tensor, visible: Tensor | None, count: Tensor) -> Tensor:
        count = count.clamp_min(1).to(torch.float64)
        shift = -count.log().to(scores.dtype) if self.bias is None else self.bias
        if torch.is_grad_enabled():
            weights = torch.sigmoid(scores * self.factor + shift)
            weights = weights if visible is None else weights.masked_fill(~visible, 0.0)
        else:  # the same in place: fewer passes over memory
            scores = scores if isinstance(self.factor, float) else scores.mul_(self.factor)
            weights = scores.add_(shift).sigmoid_()
            weights = weights if visible is None else weights.masked_fill_(~visible, 0.0)
        return weights / (count**self.power).to(scores.dtype) if self.power else weights


class Sigmoid(nn.Module):
    """Sigmoid attention on q (B,H,N,D), k (B,H_k,M,D), v (B,H_v,M,E).

    Args:
        logit_bias: b; None = -ln of each row's visible count. temperature: t; learned_temperature:
            make t a parameter. divide: divide rows by their visible count, its root, or (the
            published form, the same under a causal mask) by the query's position + 1. alibi: fall
            off with the distance, or (the published form) with the signed distance. impl: as in
            `attend`, or "triton", kernels for a GPU.
    """

    temperature: Tensor

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        logit_bias: float | None = None,
        temperature: float = 0.0,
        learned_temperature: bool = False,
        divide: Divisor | None = None,
        alibi: Decay | None = None,
        impl: Impl | Literal["triton"] = "auto",
    ) -> None:
        super().__init__()
        if divide not in (None, "count", "sqrt_count", "row", "sqrt_row"):
            raise ArgumentError(
                "divide", "None, 'count', 'sqrt_count', 'row' or 'sqrt_row'", divide
            )
        if alibi not in (None, "distance", "signed"):
            raise ArgumentError("alibi", "None, 'distance' or 'signed'", alibi)
        if alibi and impl == "triton":
            raise UnsupportedError("impl='triton'", "it adds no bias per distance (ALiBi)")
        self.logit_bias, self.divide, self.alibi = logit_bias, divide, alibi
        self.impl: Impl | Literal["triton"] = impl
        start = torch.tensor(float(temperature))
        if learned_temperature:
            self.temperature = nn.Parameter(start)
        else:
            self.register_buffer("temperature", start)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Output (B,H,N,E)."""
        check_qkv(q, k, v, call)
        power = {None: 0.0, "count": 1.0, "sqrt_count": 0.5}.get(self.divide, 0.0)
        factor = self.temperature.exp().to(q.dtype)
        if not self.alibi:  # then the temperature may as well scale the queries
            q, factor = q * factor, 1.0
        if self.impl == "triton":
            result = sigmoid_sum(q, k, v, call, bias=self.logit_bias, power=power)
        else:
            rule = SigmoidWeights(self.logit_bias, factor, power)
            fall = alibi(call.frame(q, k), signed=self.alibi == "signed") if self.alibi else None
            learned = (factor,) if isinstance(factor, Tensor) and factor.requires_grad else ()
            method = Scored(normalise=rule, score=fall, captures=learned)
            result = attend(q, k, v, call, method, impl=self.impl)
        if self.divide not in ("row", "sqrt_row"):
            return result
        rows = call.positions(q.shape[2], k.shape[2], q.device)[0][:, None, :, None] + 1
        rows = rows.clamp_min(1).to(q.dtype)
        return Result(result.output / (rows if self.divide == "row" else rows.sqrt()))


_ACTIVATIONS: dict[str, Divisor | None] = {
    "sigmoid": None,
    "seq_len_normalized_sigmoid": "row",
    "sqrt_seq_len_normalized_sigmoid": "sqrt_row",
}


def _layer(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """The authors' Attention, or CrossAttention but for its norm on values, as our layer."""
    position, activation = config["position"], config["activation"]
    options: dict[str, Any] = {
        "logit_bias": state["attn_bias"].item(),
        "temperature": state["attn_temp"].item(),
        "divide": _ACTIVATIONS.get(activation),
        "alibi": "signed" if position == "alibi" else None,
    }
    plain = activation == "softmax"
    if plain and options["alibi"]:
        raise UnsupportedError("sigmoid", "softmax with ALiBi is another mechanism")
    layer: Any = regard.create(
        "softmax" if plain else "sigmoid",
        dim=config["dim"] if "dim" in config else config["q_dim"],
        heads=config["num_heads"],
        rope="pairs" if position == "rope" else None,
        qk_norm="layer" if config.get("qk_norm") else None,
        bias="proj.bias" in state,
        **({} if plain else options),
    )
    own = _parameters(state)
    if plain:  # softmax takes the temperature in its queries
        last = "q_norm." if config.get("qk_norm") else "q_proj."
        scaled = [name for name in own if name.startswith(last)]
        own |= {name: own[name] * math.exp(options["temperature"]) for name in scaled}
    else:
        own["inner.temperature"] = state["attn_temp"][0]
    layer.load_state_dict(own)
    return layer


_PACKED = {"qkv": "qkv", "kv_proj": "kv", "proj": "o"}


def _parameters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' parameters under our names."""
    own = {}
    for name, x in state.items():
        stem, _, kind = name.partition(".")
        if stem in _PACKED:
            parts = _PACKED[stem]
            pieces = zip(parts, x.chunk(len(parts)), strict=True)
            own |= {f"{part}_proj.{kind}": piece for part, piece in pieces}
        elif stem in ("q_norm", "k_norm", "q_proj"):
            own[name] = x
    return own


def convert(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """An attention layer around this operator with the weights of the authors' Attention.

    Raises:
        UnsupportedError: CrossAttention, whose norm on values the layer does not have.
    """
    if "v_norm.weight" in state:
        raise UnsupportedError("sigmoid", "the attention layer has no norm on values")
    return _layer(config, state)


def _replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    config, state, inputs = case["config"], case["state_dict"], case["inputs"]
    cross = "kv" in inputs
    layer = _layer(config, state) if cross else convert(config, state)
    x, source = (inputs["q"], inputs["kv"]) if cross else (inputs["x"], inputs["x"])
    call = Call(
        mask=Causal() if config["causal"] else None, query_positions=torch.arange(x.shape[1])
    )
    q, k, v = layer.heads_in(x, source, call)
    if cross:
        v = F.layer_norm(v, v.shape[-1:], state["v_norm.weight"], state["v_norm.bias"])
    sight = torch.eye(k.shape[2], dtype=k.dtype).expand(k.shape[0], 1, -1, -1)
    o = layer.inner(q, k, v, call).output
    return {
        "attn_matrix": layer.inner(q, k, sight, call).output,
        "attn_times_v": o.transpose(1, 2).flatten(2),
        "attn_proj": layer.heads_out(o, x, call),
    }


SIGMOID_CARD = Card(
    name="sigmoid",
    kind="operator",
    build=Sigmoid,
    papers=(
        Paper(
            "2409.04431", "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", 2024
        ),
    ),
    family="scored",
    patterns=("noncausal self", "causal self", "noncausal cross", "causal cross"),
    grids=(1, 2, 3),
    cost=Cost(time=2, state="keys"),
    claim=Claim(
        "recalls as well as softmax without normalising rows",
        "regard compare --task recall --mechanisms softmax,sigmoid",
    ),
    limits=(Limit({"logit_bias": 1e4, "divide": "count"}, "uniform"),),
    goldens=(
        Golden(
            "130_sigmoid.pt",
            _replay,
            "apple/ml-sigmoid-attention: attention_simulator/src/attention_simulator/layers/"
            "attention.py: Attention, CrossAttention",
            "9273b49",
        ),
    ),
    convert=convert,
    deviations=(
        "the bias follows the visible count of each row by default, not the training length",
        "rows are divided by their visible count; the published row index is an option",
    ),
)
