r"""cosFormer: linear attention on relu features, re-weighted so that far keys count less.

    o_i = sum_j a_ij v_j / sum_j a_ij        a_ij = relu(q_i) . relu(k_j) cos(pi (i - j) / 2m)
                                                  = phi(q_i) . phi(k_j)
    phi(x_i) = [relu(x_i) sin(pi i / 2m), relu(x_i) cos(pi i / 2m)]        (…,D) -> (…,2D)

q: (B,H,N,D)  k: (B,H_k,M,D)  v: (B,H_v,M,E); i and j are positions, counted from 1. m is `horizon`,
or without one max(N, M) over the real tokens of each sequence: the tokens that the positions span.
No a_ij is negative while no distance exceeds m. There is no 1/sqrt(D), which would cancel. Without
a horizon the weights depend on the total length, so causal calls, which may go on, need one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Golden, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.recurrent import Form, Memory, Recurrent, is_causal, recur, widened
from regard.core.scored import without_padding

_FAR = 1 << 40  # beyond every position


def cosformer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    horizon: int | None = None,
    chunk: int = 64,
    form: Form = "auto",
    state: Memory | None = None,
) -> Result:
    """Normalised linear attention on re-weighted relu features (Qin et al.).

    horizon: m, at least the tokens that positions span from 0 on; None: those of each sequence.

    Raises:
        ArgumentError: positions that the horizon does not hold.
        UnsupportedError: a causal call without a horizon.
    """
    check_qkv(q, k, v, call)
    if is_causal(call, "cosformer") and horizon is None:
        raise UnsupportedError("cosformer", "causal weights need a fixed length, horizon=m")
    dtype = q.dtype
    q, k, v = (widened(x) for x in without_padding(q, k, v, call))
    places = call.positions(q.shape[2], k.shape[2], q.device)
    m = _span(places, call) if horizon is None else _held(places, call, horizon)
    q, k = (reweighted(x, p, m) for x, p in zip((q, k), places, strict=True))
    method = Recurrent(normalise=True, chunk=chunk)
    result = recur(q, k, v, call, method, state=state, form=form)
    return Result(result.output.to(dtype), state=result.state)


def reweighted(x: Tensor, positions: Tensor, m: Tensor | int) -> Tensor:
    """phi(x), (B,H,N,2D), of x (B,H,N,D) at positions (B or 1,N) from 0; m is a number or (B,1)."""
    angles = (positions + 1).double() * (math.pi / 2) / m
    sin, cos = (turn.to(x.dtype)[:, None, :, None] for turn in (angles.sin(), angles.cos()))
    return torch.cat([x.relu() * sin, x.relu() * cos], -1)


def _last(places: tuple[Tensor, Tensor], call: Call, sign: int = 1) -> Tensor:
    """Greatest sign * position of the real queries and keys, (B or 1,1); -_FAR where none is."""
    found = []
    for positions, real in zip(places, (call.query_padding, call.padding), strict=True):
        signed = sign * positions.long()
        signed = signed if real is None else signed.masked_fill(~real, -_FAR)
        found.append(F.pad(signed, (0, 1), value=-_FAR).amax(1, keepdim=True))
    return torch.maximum(found[0], found[1])


def _span(places: tuple[Tensor, Tensor], call: Call) -> Tensor:
    """Tokens from the first real position to the last, (B or 1,1), at least 1."""
    return (_last(places, call) + _last(places, call, -1) + 1).clamp_min(1)


def _held(places: tuple[Tensor, Tensor], call: Call, horizon: int) -> int:
    """The horizon, which must hold the tokens from 0, or an earlier first position, to the last."""
    if torch.compiler.is_compiling():
        reach = max(p.shape[1] for p in places)  # a graph cannot read positions
    else:
        counts = _last(places, call) + _last(places, call, -1).clamp_min(0) + 1
        reach = max([1, *counts.flatten().tolist()])
    if reach > horizon:
        raise ArgumentError("horizon", f"at least {reach}, to hold every position", horizon)
    return horizon


def replay(case: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' layer around the operator: all rows count from 1, and m counts padding too."""
    inputs, weights = case["inputs"], case["state_dict"]
    x, hidden = inputs["query"], inputs.get("key_padding_mask")
    sources = {"q": x, "k": inputs.get("key", x), "v": inputs.get("key", x)}
    q, k, v = (
        F.linear(source, weights[f"{name}_proj.weight"], weights[f"{name}_proj.bias"])
        .unflatten(-1, (case["config"]["num_heads"], -1))
        .transpose(1, 2)
        for name, source in sources.items()
    )
    call = Call(
        padding=None if hidden is None else ~hidden.bool(),
        query_positions=torch.arange(q.shape[2]),
        key_positions=torch.arange(k.shape[2]),
    )
    horizon = None if hidden is None else max(q.shape[2], k.shape[2])
    o = cosformer(q, k, v, call, horizon=horizon).output
    joined = o.transpose(1, 2).flatten(2)
    return {"y": F.linear(joined, weights["out_proj.weight"], weights["out_proj.bias"])}


COSFORMER = Card(
    name="cosformer",
    kind="operator",
    build=cosformer,
    papers=(Paper("2202.08791", "cosFormer: Rethinking Softmax in Attention", 2022),),
    family="recurrent",
    patterns=("noncausal self", "causal self", "noncausal cross"),
    cost=Cost(time=1, state="constant"),
    claim=Claim(
        "comes close to softmax at linear cost",
        "regard compare --task recall --mechanisms 'softmax,linear,cosformer(horizon=64)'",
    ),
    # beyond the example's tokens for decoding, twelve times as many, and for counting the cost
    example=Example(sized=lambda size: {"horizon": max(12 * size[0], 192)}),
    forms=("form", ("parallel", "chunk", "scan")),
    goldens=(
        Golden(
            file="40_cab_attentions.pt",
            replay=replay,
            source="Shark-NLP/CAB:efficient-attention/efficient_attention/modules/*.py",
            commit="0e49696",
            only=lambda case: case["config"].get("cls") == "CosformerAttention",
        ),
    ),
    deviations=(
        "without a horizon, m counts real tokens only: padding changes nothing",
        "in cross attention the queries stand at the last keys unless the call says otherwise",
    ),
)
