r"""Element-wise attention as one Triton kernel: every key is weighed on its own, so a row needs no
statistics, neither forward nor backward.

    a_ij = sigma(s q_i . k_j + b_i) [key_j <= query_i]     o_i = sum_j a_ij v_j
    ds_ij = (do_i . v_j) a_ij (1 - a_ij)

q, o (B,H,N,D or E), k, v (B,H_k,M,·), shift b (B,N). Visibility compares two numbers, one per query
and one per key (`Reach`), which covers causality at any positions, padding and ragged tails; block
loops end where a block of queries sees no more. sigma is 1/(1 + e^-x), not (1 + tanh(x/2))/2: a
weight near 1/n would lose its digits to the cancellation. No matrix of N x M exists; gradients of
keys are summed within one program each, so results do not vary from run to run.

The kernels were compiled for an H200 (sm_90) and checked in Triton's interpreter; their speed on a
GPU is not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.core.kernels.tiles import heads, load, product, store

NEVER, ALWAYS = tl.constexpr(2**31 - 1), tl.constexpr(-(2**31))
"""Numbers of a key that nobody sees, and of a query that sees nobody."""


class Reach(NamedTuple):
    """Who sees whom, as int32: query (B,N) sees key (B,M) iff key <= query; `last` (B,N) counts the
    keys up to the last one a query sees; `first` (B,M) is the first query that sees a key.
    """

    query: Any
    key: Any
    last: Any
    first: Any


@triton.jit
def _numbers(x, batch, rows, length, missing):
    return tl.load(x + batch * length + rows, mask=rows < length, other=missing)


@triton.jit
def _sight(reach, shift, batch, rows, length) -> Any:
    """Of a block of queries: their numbers, their shifts, and where the last key they see ends."""
    seen = _numbers(reach.query, batch, rows, length, ALWAYS)
    bias = _numbers(shift, batch, rows, length, 0.0)
    return seen, bias, tl.max(_numbers(reach.last, batch, rows, length, 0), 0)


@triton.jit
def _weights(a, b, scale, bias, visible):
    """sigma(s a b^T + bias), 0 where invisible; the exponential is never above 1."""
    scores = product(a, tl.trans(b)) * scale + bias
    small = tl.exp(-tl.abs(scores))
    return tl.where(visible, tl.where(scores >= 0, 1.0, small) / (1.0 + small), 0.0)


@triton.jit
def _forward(
    inputs, o, reach, factors, D: tl.constexpr, E: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """o of R queries of one head; a loop over blocks of C keys. factors: (scale, shift)."""
    q, k, v = inputs
    batch, head = tl.program_id(1), tl.program_id(2)
    rows, values = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, E)
    seen, bias, end = _sight(reach, factors[1], batch, rows, q.length)
    queries = load(q, batch, head, rows, tl.arange(0, D))
    total = tl.zeros((R, E), tl.float32)
    for start in range(0, end, C):
        columns = start + tl.arange(0, C)
        number = _numbers(reach.key, batch, columns, k.length, NEVER)
        keys = load(k, batch, head, columns, tl.arange(0, D))
        visible = number[None, :] <= seen[:, None]
        weights = _weights(queries, keys, factors[0], bias[:, None], visible)
        content = load(v, batch, head, columns, values)
        total += product(weights.to(content.dtype), content)
    store(o, batch, head, rows, values, total)


@triton.jit
def _backward_queries(
    inputs, do, dq, reach, factors, D: tl.constexpr, E: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """dq of R queries of one head; a loop over blocks of C keys."""
    q, k, v = inputs
    batch, head = tl.program_id(1), tl.program_id(2)
    rows, wide = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, D)
    seen, bias, end = _sight(reach, factors[1], batch, rows, q.length)
    queries = load(q, batch, head, rows, wide)
    upstream = load(do, batch, head, rows, tl.arange(0, E))
    total = tl.zeros((R, D), tl.float32)
    for start in range(0, end, C):
        columns = start + tl.arange(0, C)
        number = _numbers(reach.key, batch, columns, k.length, NEVER)
        keys = load(k, batch, head, columns, wide)
        visible = number[None, :] <= seen[:, None]
        weights = _weights(queries, keys, factors[0], bias[:, None], visible)
        content = load(v, batch, head, columns, tl.arange(0, E))
        slope = product(upstream, tl.trans(content)) * weights * (1.0 - weights)
        total += product(slope.to(keys.dtype), keys)
    store(dq, batch, head, rows, wide, total * factors[0])


@triton.jit
def _backward_keys(
    inputs, do, outputs, reach, factors, D: tl.constexpr, E: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """dk and dv of C keys of one key head; a loop over its query heads and blocks of R queries."""
    (q, k, v), (dk, dv), (scale, shift) = inputs, outputs, factors
    columns, wide = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, D)
    batch, values = tl.program_id(1), tl.arange(0, E)
    leader = tl.program_id(2) * k.group  # the first query head of the group
    number = _numbers(reach.key, batch, columns, k.length, NEVER)
    begin = tl.min(_numbers(reach.first, batch, columns, k.length, NEVER), 0) // R * R
    keys, content = load(k, batch, leader, columns, wide), load(v, batch, leader, columns, values)
    key_total, value_total = tl.zeros((C, D), tl.float32), tl.zeros((C, E), tl.float32)
    for head in range(leader, leader + k.group):
        for start in range(begin, q.length, R):
            rows = start + tl.arange(0, R)
            seen, bias, _ = _sight(reach, shift, batch, rows, q.length)
            queries = load(q, batch, head, rows, wide)
            upstream = load(do, batch, head, rows, values)
            visible = number[:, None] <= seen[None, :]
            weights = _weights(keys, queries, scale, bias[None, :], visible)
            value_total += product(weights.to(upstream.dtype), upstream)
            slope = product(content, tl.trans(upstream)) * weights * (1.0 - weights)
            key_total += product(slope.to(queries.dtype), queries)
    store(dk, batch, leader, columns, wide, key_total * scale)
    store(dv, batch, leader, columns, values, value_total)


def _plan(q: Tensor, v: Tensor) -> dict[str, Any]:
    """Tile sizes and warps, fixed by the bytes of the widest row: what sm_90 has room for."""
    size = max(q.shape[3], v.shape[3]) * q.element_size()
    rows, columns = (64, 64) if size <= 256 else (64, 32) if size <= 512 else (32, 32)
    sizes = {"D": q.shape[3], "E": v.shape[3], "R": rows, "C": columns}
    return sizes | {"num_warps": 4 if size <= 128 else 8, "enable_fp_fusion": True}


@torch.library.custom_op("regard::sigmoid_attention", mutates_args=())
def sigmoid_attention(
    q: Tensor, k: Tensor, v: Tensor, shift: Tensor, reach: Sequence[Tensor], scale: float
) -> Tensor:
    """o (B,H,N,E) of q (B,H,N,D), k (B,H_k,M,D), v (B,H_k,M,E), shift (B,N) float32 and the fields
    of a `Reach`, contiguous.
    """
    (batch, count, n, _), plan = q.shape, _plan(q, v)
    o = q.new_empty(batch, count, n, v.shape[3])
    parts = tuple(heads(x, count) for x in (q, k, v))
    grid = (triton.cdiv(n, plan["R"]), batch, count)
    with torch.cuda.device_of(q):
        _forward[grid](parts, heads(o, count), Reach(*reach), (scale, shift), **plan)
    return o


@torch.library.custom_op("regard::sigmoid_attention_backward", mutates_args=())
def _sigmoid_attention_backward(
    do: Tensor,
    inputs: Sequence[Tensor],
    shift: Tensor,
    reach: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = inputs
    (batch, count, n, _), plan = q.shape, _plan(q, v)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
    parts, upstream = tuple(heads(x, count) for x in inputs), heads(do, count)
    sight, factors = Reach(*reach), (scale, shift)
    outputs = (heads(dk, count), heads(dv, count))
    by_query = (triton.cdiv(n, plan["R"]), batch, count)
    by_key = (triton.cdiv(k.shape[2], plan["C"]), batch, k.shape[1])
    with torch.cuda.device_of(q):
        _backward_queries[by_query](parts, upstream, heads(dq, count), sight, factors, **plan)
        _backward_keys[by_key](parts, upstream, outputs, sight, factors, **plan)
    return dq, dk, dv


@sigmoid_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, shift: Tensor, reach: Sequence[Tensor], scale: float) -> Any:
    return q.new_empty(*q.shape[:3], v.shape[3])


@_sigmoid_attention_backward.register_fake
def _(
    do: Tensor, inputs: Sequence[Tensor], shift: Tensor, reach: Sequence[Tensor], scale: float
) -> Any:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, shift, reach, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, shift, *reach)


def _pull(ctx: Any, do: Tensor) -> tuple[Any, ...]:
    q, k, v, shift, *reach = ctx.saved_tensors
    gradients = _sigmoid_attention_backward(do, [q, k, v], shift, reach, ctx.scale)
    return (*gradients, None, [None] * len(reach), None)


sigmoid_attention.register_autograd(_pull, setup_context=_keep)
