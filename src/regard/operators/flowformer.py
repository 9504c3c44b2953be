r"""Flow-attention: linear attention whose keys compete for a conserved flow and whose queries are
gated by what they receive.

    I_i = q_i . sum_j k_j            O_j = k_j . sum_i q_i                (flow in, flow out)
    I'_i = q_i . sum_j k_j / O_j     O'_j = k_j . sum_i q_i / I_i         (after conservation)
    o_i = sigmoid(I'_i N/M) (q_i / I_i) . sum_j k_j (c_j v_j)^T           c_j = M softmax_j(O'_j)

q: (B,H,N,D)  k: (B,H_k,M,D)  v: (B,H_v,M,E), q and k after a sigmoid; eps is added to every factor
of I, O, I' and O'. N and M count real tokens. Causal: every sum stops at the own token t, 1/I and
1/O are multiplied by t inside the sums, I' and O' divided by t, and M = t in c_j. O' is clamped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.boundary import check_qkv, refuse
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Golden, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mask import Causal
from regard.core.recurrent import Form, Memory, Recurrent, is_causal, recur, widened
from regard.core.scored import without_padding
from regard.core.weights import repeat_heads

Feature = Literal["sigmoid", "relu"]
_NEVER = -1e30  # a log weight that adds nothing, finite so that its gradient is


@dataclass(frozen=True, eq=False)
class Flow:
    """Decode state: running sums of k, q, k t/O and q t/I (B,H,1,D), the log of the competition's
    denominator (B,H,1,1), the tokens seen (B,1,1,1), and the memory of competing values.
    """

    keys: Tensor
    queries: Tensor
    sent: Tensor
    received: Tensor
    rivals: Tensor
    seen: Tensor
    memory: Memory | None


@dataclass(frozen=True)
class _Rule:
    """Constants of a variant: eps of every factor, the second one of the vision code, the clamp."""

    eps: float
    again: float
    clamp: float | None

    def flow(self, a: Tensor, b: Tensor) -> Tensor:
        """(a + eps) . (b + eps), (B,H,·,1)."""
        return ((a + self.eps) * (b + self.eps)).sum(-1, keepdim=True) + self.again

    def clamped(self, source: Tensor) -> Tensor:
        return source if self.clamp is None else source.clamp(-self.clamp, self.clamp)


def flowformer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    clamp: float | None = 1.0,
    feature: Feature = "sigmoid",
    eps_twice: bool = False,
    form: Form = "auto",
    state: Flow | None = None,
) -> Result:
    """Flow-attention. clamp: bound on O' (1 in the main code, 5 language and vision, 10 decisions,
    None time series). feature: "relu" is relu + eps. eps_twice: add eps to the flows themselves
    too, as the vision code does.
    """
    check_qkv(q, k, v, call)
    refuse(call, "flowformer", "scale")
    dtype, rule = q.dtype, _Rule(1e-6, 1e-6 if eps_twice else 0.0, clamp)
    causal = is_causal(call, "flowformer")
    if causal and q.shape[2] != k.shape[2]:
        raise UnsupportedError("flowformer", "causal cross attention has no conserved flow")
    q, k, v = (widened(x) for x in without_padding(q, k, v, call))
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    # a second pass clears the features of padded tokens, sigmoid(0) = 1/2
    q, k, v = without_padding(_positive(q, feature), _positive(k, feature), v, call)
    if causal:
        result = _causal(q, k, v, call, rule, state, form)
    elif state is not None:
        raise UnsupportedError("flowformer", "carried state needs a causal mask")
    else:
        result = _noncausal(q, k, v, call, rule, form)
    return Result(result.output.to(dtype), state=result.state)


def _positive(x: Tensor, feature: Feature) -> Tensor:
    if feature == "sigmoid":
        return x.sigmoid()
    if feature == "relu":
        return x.relu() + 1e-6
    raise ArgumentError("feature", "'sigmoid' or 'relu'", feature)


def _noncausal(q: Tensor, k: Tensor, v: Tensor, call: Call, rule: _Rule, form: Form) -> Result:
    n, m = _count(call.query_padding, q), _count(call.padding, k)
    incoming = rule.flow(q, k.sum(2, keepdim=True)).reciprocal()
    outgoing = rule.flow(k, q.sum(2, keepdim=True)).reciprocal()
    sink = rule.flow(q, (k * outgoing).sum(2, keepdim=True))
    source = rule.clamped(rule.flow(k, (q * incoming).sum(2, keepdim=True)))
    if call.padding is not None:
        source = source.masked_fill(~call.padding[:, None, :, None], _NEVER)
    rivals = m * source.softmax(2)
    result = recur(q * incoming, k, v * rivals, call, Recurrent(), form=form)
    return Result((sink * n / m).sigmoid() * result.output)


def _causal(
    q: Tensor, k: Tensor, v: Tensor, call: Call, rule: _Rule, state: Flow | None, form: Form
) -> Result:
    if q.shape[2] == 0:
        return Result(torch.zeros_like(v), state=state)
    real = torch.ones_like(k[:, :1, :, :1])
    if call.padding is not None:
        real = call.padding[:, None, :, None].to(k.dtype)
    past = _nothing(k) if state is None else state
    seen = past.seen + real.cumsum(2)
    t = seen.clamp_min(1.0)
    keys, queries = past.keys + k.cumsum(2), past.queries + q.cumsum(2)
    incoming, outgoing = rule.flow(q, keys).reciprocal(), rule.flow(k, queries).reciprocal()
    sent = past.sent + (k * outgoing * t).cumsum(2)
    received = past.received + (q * incoming * t).cumsum(2)
    source = rule.clamped(rule.flow(k, received) / t).masked_fill(real == 0, _NEVER)
    rivals = torch.logaddexp(past.rivals, source.logcumsumexp(2))
    competing = v * t * (source - rivals).exp()
    result = recur(q * incoming, k, competing, call, Recurrent(), state=past.memory, form=form)
    after = [x[:, :, -1:] for x in (keys, queries, sent, received, rivals, seen)]
    allocation = (rule.flow(q, sent) / t).sigmoid()
    return Result(allocation * result.output, state=Flow(*after, memory=result.state))


def _nothing(k: Tensor) -> Flow:
    """The state before the first token."""
    zero, one = torch.zeros_like(k[:, :, :1]), torch.zeros_like(k[:, :, :1, :1])
    return Flow(zero, zero, zero, zero, one + _NEVER, one[:, :1], None)


def _count(padding: Tensor | None, x: Tensor) -> Tensor | float:
    """Real tokens per sequence, (B,1,1,1), at least 1."""
    if padding is None:
        return float(max(x.shape[2], 1))
    return padding.sum(-1).clamp_min(1).to(x.dtype)[:, None, None, None]


def replay(case: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' layer around the operator, in float32 and float64."""
    found = {"y": _layer(case, torch.float32)}
    return {**found, "y64": _layer(case, torch.float64)} if "y64" in case["outputs"] else found


def _layer(case: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    weights = {name: w.to(dtype) for name, w in case["state_dict"].items()}
    inputs = {name: x.to(dtype) for name, x in case["inputs"].items()}
    heads = case["config"].get("n_heads") or case["config"]["num_heads"]
    vision = "qkv.weight" in weights
    if vision:
        (x,) = inputs.values()
        q, k, v = F.linear(x, weights["qkv.weight"], weights["qkv.bias"]).chunk(3, -1)
        last = "proj"
    else:
        q, k, v = (
            F.linear(inputs[x], weights[f"{w}_projection.weight"], weights[f"{w}_projection.bias"])
            for w, x in (("query", "queries"), ("key", "keys"), ("value", "values"))
        )
        last = "out_projection"
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    call = Call(mask=Causal() if "Causal" in case["config"].get("cls", "") else None)
    clamp = 5.0 if vision else 1.0
    o = flowformer(q, k, v, call, clamp=clamp, eps_twice=vision).output
    return F.linear(
        o.transpose(1, 2).flatten(2), weights[f"{last}.weight"], weights[f"{last}.bias"]
    )


FLOWFORMER = Card(
    name="flowformer",
    kind="operator",
    build=flowformer,
    papers=(
        Paper("2202.06258", "Flowformer: Linearizing Transformers with Conservation Flows", 2022),
    ),
    family="recurrent",
    patterns=("noncausal self", "causal self", "noncausal cross"),
    grids=(1, 2, 3),
    cost=Cost(time=1, state="constant"),
    claim=Claim(
        "recalls better than elu+1 features at linear cost",
        "regard compare --task recall --mechanisms linear,flowformer,softmax",
    ),
    forms=("form", ("parallel", "chunk", "scan")),
    goldens=(
        Golden(
            file="45_flow_attention.pt",
            replay=replay,
            source="thuml/Flowformer:Flow_Attention.py, Flowformer_CV/flowformer.py",
            commit="61f5d8c",
        ),
    ),
)
