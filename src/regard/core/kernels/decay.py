r"""Causal linear attention with a fixed decay per head as two Triton kernels, time running either
way.

    S_t = e^{g (c_t - c_{t-1})} S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

q (B,H,N,D), k (B,H_k,N,D), v (B,H_v,N,E), g <= 0 per head, S (B,H,D,E) in float32. c is a clock
that counts real tokens, (B,N), so that no time passes during padding and exponents are exact
multiples of g, never positive. `_carry` walks over the chunks of a head and notes the state at
which each begins, in parallel over heads and tiles of the state; `_read` then serves all chunks at
once: scores inside a chunk, the state for what came before.

Backward needs no other kernel. Each gradient is the same sum with the roles exchanged; for keys and
values, and for the states S' of q do^T that they read, time runs backwards (marked by a dash), from
the gradient of the last state to that of the first:

    dq = read(do, v, k, S^T)      dk = read'(v, do, q, S'^T)      dv = read'(k, q, do, S')

States are computed again rather than kept. What is not read from the inputs is float32: products
with it keep all digits for float32 inputs, ten bits (tf32) for 16-bit ones, and cannot overflow.

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


class Pace(NamedTuple):
    """How a state fades, as a kernel argument: clock (B,N) int32, log decay (H,) float32."""

    clock: Any
    decay: Any
    heads: int
    length: int


class States(NamedTuple):
    """States before (in time order) each chunk, (B,H,chunks,D,E), with the strides of D and E."""

    data: Any
    chunks: int
    row: int
    column: int
    size: int


@triton.jit
def _times(pace, batch, chunk, C: tl.constexpr):
    """The C rows of a chunk; how much time passed from its begin to each row, passes from each row
    to its end, and in all. Time stands still past the last row.
    """
    rows = chunk * C + tl.arange(0, C)
    clock = pace.clock + batch * pace.length
    begin = tl.load(clock + chunk * C - 1, mask=chunk > 0, other=0)
    end = tl.load(clock + tl.minimum((chunk + 1) * C, pace.length) - 1)
    now = tl.load(clock + rows, mask=rows < pace.length, other=0)
    now = tl.where(rows < pace.length, now, end)
    return rows, now - begin, end - now, end - begin


@triton.jit
def _spots(states, index, chunk, rows, columns):
    """Addresses of a tile of one chunk's state."""
    start = states.data + (index.to(tl.int64) * states.chunks + chunk) * states.size
    return start + rows[:, None] * states.row + columns[None, :] * states.column


@triton.jit
def _carry(
    k, v, states, ends, pace, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    REVERSED: tl.constexpr,
):  # fmt: skip
    """A D x E tile of one head's states; a loop over chunks of C tokens. ends: the state before
    the first step, and where to write the one after the last.
    """
    index, before, after = tl.program_id(2), ends[0], ends[1]
    batch, head = index // pace.heads, index % pace.heads
    wide = tl.program_id(0) * D + tl.arange(0, D)
    values = tl.program_id(1) * E + tl.arange(0, E)
    exact: tl.constexpr = k.data.dtype.element_ty == tl.float32
    rate = tl.load(pace.decay + head)
    state = tl.load(_spots(before, index, 0, wide, values))
    for step in range(states.chunks):
        chunk = states.chunks - 1 - step if REVERSED else step
        tl.store(_spots(states, index, chunk, wide, values), state)
        rows, since, until, whole = _times(pace, batch, chunk, C)
        keys = load(k, batch, head, rows, wide).to(tl.float32)
        keys *= tl.exp(rate * (since if REVERSED else until))[:, None]
        content = load(v, batch, head, rows, values).to(tl.float32)
        state = state * tl.exp(rate * whole) + product(tl.trans(keys), content, exact)
    tl.store(_spots(after, index, 0, wide, values), state)


@triton.jit
def _read(
    inputs, o, states, pace, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    REVERSED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """E columns of o for one chunk of C tokens of one head; a loop over D of the WIDTH features."""
    q, k, v = inputs
    chunk, index = tl.program_id(0), tl.program_id(2)
    batch, head = index // pace.heads, index % pace.heads
    values = tl.program_id(1) * E + tl.arange(0, E)
    exact: tl.constexpr = q.data.dtype.element_ty == tl.float32
    rate = tl.load(pace.decay + head)
    rows, since, until, _ = _times(pace, batch, chunk, C)
    fade = tl.exp(rate * (until if REVERSED else since))
    scores, total = tl.zeros((C, C), tl.float32), tl.zeros((C, E), tl.float32)
    for start in range(0, WIDTH, D):
        wide = start + tl.arange(0, D)
        queries, keys = load(q, batch, head, rows, wide), load(k, batch, head, rows, wide)
        scores += product(queries, tl.trans(keys), exact)
        state = tl.load(_spots(states, index, chunk, wide, values))
        total += product(queries.to(tl.float32) * fade[:, None], state, exact)
    visible = rows[:, None] <= rows[None, :] if REVERSED else rows[:, None] >= rows[None, :]
    kept = tl.exp(rate * tl.abs(since[:, None] - since[None, :]))
    scores = tl.where(visible, scores * kept, 0.0)
    total += product(scores, load(v, batch, head, rows, values).to(tl.float32), exact)
    store(o, batch, head, rows, values, total)


def _states(x: Tensor, transposed: bool = False) -> States:
    """x (B,H,chunks,D,E) or (B,H,D,E), contiguous, as a kernel argument."""
    d, e = x.shape[-2:]
    row, column = (1, e) if transposed else (e, 1)
    return States(x, x.shape[2] if x.ndim == 5 else 1, row, column, d * e)


def _plan(x: Tensor, chunk: int, d: int, e: int, backward: bool) -> dict[str, Any]:
    """Chunk, tile of a D x E state, direction and warps: what sm_90 has room for."""
    sizes = {"C": chunk, "D": min(d, 64), "E": min(e, 64), "REVERSED": backward}
    return sizes | {"num_warps": 8 if x.element_size() == 4 else 4, "enable_fp_fusion": True}


def _walk(
    k: Tensor, v: Tensor, start: Tensor, pace: Pace, chunk: int, backward: bool
) -> tuple[Tensor, Tensor]:
    """States before each chunk, (B,H,chunks,D,E), and after the last, from the one at the start."""
    batch, count, d, e = start.shape
    states = start.new_empty(batch, count, triton.cdiv(pace.length, chunk), d, e)
    after = torch.empty_like(start)
    plan, ends = _plan(k, chunk, d, e, backward), (_states(start), _states(after))
    _carry[(d // plan["D"], e // plan["E"], batch * count)](
        heads(k, count), heads(v, count), _states(states), ends, pace, **plan
    )
    return states, after


def _serve(
    inputs: tuple[Tensor, Tensor, Tensor], o: Tensor, states: States, pace: Pace, chunk: int,
    backward: bool = False,
) -> None:  # fmt: skip
    """Fill o (B,H,N,E) with what the queries (B,H,N,D) read."""
    width, count = inputs[0].shape[3], o.shape[1]
    plan = _plan(inputs[0], chunk, width, o.shape[3], backward)
    plan["WIDTH"] = width
    _read[(states.chunks, o.shape[3] // plan["E"], o.shape[0] * count)](
        tuple(heads(x, count) for x in inputs), heads(o, count), states, pace, **plan
    )


@torch.library.custom_op("regard::decayed_attention", mutates_args=())
def decayed_attention(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, pace: Sequence[Tensor], chunk: int
) -> tuple[Tensor, Tensor]:
    """o (B,H,N,E) and the last state (B,H,D,E) of q (B,H,N,D), k (B,H_k,N,D), v (B,H_v,N,E), a
    first state in float32, and clock (B,N) int32 with log decay (H,) float32, all contiguous but
    q, k, v.
    """
    when = Pace(pace[0], pace[1], q.shape[1], q.shape[2])
    o = q.new_empty(*q.shape[:3], v.shape[3])
    with torch.cuda.device_of(q):
        states, after = _walk(k, v, state, when, chunk, backward=False)
        _serve((q, k, v), o, _states(states), when, chunk)
    return o, after


@torch.library.custom_op("regard::decayed_attention_backward", mutates_args=())
def _decayed_attention_backward(
    upstream: Sequence[Tensor],
    inputs: Sequence[Tensor],
    state: Tensor,
    pace: Sequence[Tensor],
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    do, dafter = upstream
    q, k, v = inputs
    when = Pace(pace[0], pace[1], q.shape[1], q.shape[2])
    dq = q.new_empty(q.shape)
    dk, dv = (state.new_empty(*q.shape[:3], x.shape[3]) for x in (k, v))  # per query head
    with torch.cuda.device_of(q):
        states, _ = _walk(k, v, state, when, chunk, backward=False)
        _serve((do, v, k), dq, _states(states, transposed=True), when, chunk)
        states, dstate = _walk(q, do, dafter, when, chunk, backward=True)
        _serve((v, do, q), dk, _states(states, transposed=True), when, chunk, backward=True)
        _serve((k, q, do), dv, _states(states), when, chunk, backward=True)
    return dq, _gathered(dk, k), _gathered(dv, v), dstate


def _gathered(gradient: Tensor, x: Tensor) -> Tensor:
    """(B,H,N,D) in float32 summed over the query heads that share a head of x (B,H_x,N,D)."""
    return gradient.unflatten(1, (x.shape[1], -1)).sum(2).to(x.dtype)


@decayed_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, state: Tensor, pace: Sequence[Tensor], chunk: int) -> Any:
    return q.new_empty(*q.shape[:3], v.shape[3]), torch.empty_like(state)


@_decayed_attention_backward.register_fake
def _(
    upstream: Sequence[Tensor],
    inputs: Sequence[Tensor],
    state: Tensor,
    pace: Sequence[Tensor],
    chunk: int,
) -> Any:
    return (*(x.new_empty(x.shape) for x in inputs), torch.empty_like(state))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, state, pace, ctx.chunk = inputs
    ctx.save_for_backward(q, k, v, state, *pace)


def _pull(ctx: Any, do: Tensor, dafter: Tensor) -> tuple[Any, ...]:
    q, k, v, state, *pace = ctx.saved_tensors
    upstream = [do, dafter.contiguous()]
    gradients = _decayed_attention_backward(upstream, [q, k, v], state, pace, ctx.chunk)
    return (*gradients, [None, None], None)


decayed_attention.register_autograd(_pull, setup_context=_keep)
