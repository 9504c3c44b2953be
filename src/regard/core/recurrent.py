r"""Recurrent family: keys and values are written into a state of fixed size, queries read it.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t        (divided by z_t = q_t .
    sum_{j<=t} decay k_j on request)

q (B,H,N,F) and k (B,H_k,N,F) are features, already mapped; g <= 0 is the log decay, per head (H,),
per token (B,H,N) or per channel (B,H,N,F). Four forms compute the same thing: `step` (one token),
`scan` (a loop of steps), `chunk` (matmuls inside blocks, a state between them) and `parallel` (the
quadratic definition). Without causality there is one state for all queries. The normaliser is a
column of ones in the values, so that it needs no code of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.core.boundary import check_qkv, refuse
from regard.core.call import Call, Result
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mask import Causal
from regard.core.scored import repeat_heads, without_padding

Form = Literal["auto", "parallel", "chunk", "scan"]


@dataclass(frozen=True, eq=False)
class Memory:
    """State of a recurrent mechanism after some tokens: S (B,H,F,E), one column wider where it is
    normalised.
    """

    content: Tensor


@dataclass(frozen=True, eq=False)
class Recurrent:
    """One recurrent mechanism, as data.

    log_decay: (H,), (B,H,N) or (B,H,N,F), at most 0; None = nothing is forgotten. normalise: divide
    by the summed weights (plus eps). chunk: block length of the `chunk` form.
    """

    log_decay: Tensor | None = None
    normalise: bool = False
    eps: float = 0.0
    chunk: int = 64


def recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    method: Recurrent,
    *,
    state: Memory | None = None,
    form: Form = "auto",
) -> Result:
    """Run a recurrent mechanism; Result.state is the memory after the last token (causal calls
    only).

    q (B,H,N,F), k (B,H_k,M,F), v (B,H_v,M,E) -> output (B,H,N,E). The call's mask must be None
    (every query reads the whole state) or Causal(); `state` continues a causal call.

    Raises:
        UnsupportedError: another mask, a decay or a state in a noncausal call, or causal cross
            attention.
    """
    check_qkv(q, k, v, call)
    refuse(call, "a recurrent mechanism", "scale")
    causal = is_causal(call, "a recurrent mechanism")
    q, k, v = without_padding(q, k, v, call)
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    k, decay = _skip_padding(k, _token_decay(method.log_decay, q), call)
    if method.normalise:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    if causal:
        if q.shape[2] != k.shape[2]:
            raise UnsupportedError(
                "a recurrent mechanism", f"causal with {q.shape[2]} queries and {k.shape[2]} keys"
            )
        o, content = _forms(form, method.chunk)(
            q, k, v, decay, None if state is None else state.content
        )
        after = Memory(content)
    else:
        if method.log_decay is not None or state is not None:
            raise UnsupportedError(
                "a recurrent mechanism", "decay and carried state need a causal mask"
            )
        o, after = q @ (k.transpose(-1, -2) @ v), None
    if method.normalise:
        o = _divided(o[..., :-1], o[..., -1:], method.eps)
    if call.query_padding is not None:
        o = o.masked_fill(~call.query_padding[:, None, :, None], 0.0)
    return Result(o, state=after)


def is_causal(call: Call, who: str) -> bool:
    """Whether the call is causal; a mask other than Causal() is refused in the name of `who`."""
    if call.mask is None:
        return False
    if call.mask == Causal():
        return True
    raise UnsupportedError(
        who, f"a state cannot honour the mask {type(call.mask).__name__}; only None or Causal()"
    )


def _divided(numerator: Tensor, total: Tensor, eps: float) -> Tensor:
    nothing = total + eps == 0
    return (numerator / (total + eps).masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)


def _token_decay(log_decay: Tensor | None, q: Tensor) -> Tensor | None:
    """Log decay as (B,H,N,1) or (B,H,N,F)."""
    if log_decay is None:
        return None
    shape = q.shape[:3]
    if log_decay.ndim == 1:
        return log_decay.to(q.dtype)[None, :, None, None].expand(*shape, 1)
    if log_decay.shape[:3] != shape:
        raise ArgumentError(
            "log_decay", f"(H,), {tuple(shape)} or {tuple(q.shape)}", tuple(log_decay.shape)
        )
    return log_decay if log_decay.ndim == 4 else log_decay[..., None]


def _skip_padding(k: Tensor, decay: Tensor | None, call: Call) -> tuple[Tensor, Tensor | None]:
    """Padded tokens write nothing and let no time pass."""
    if call.padding is None:
        return k, decay
    gone = ~call.padding[:, None, :, None]
    return k.masked_fill(gone, 0.0), None if decay is None else decay.masked_fill(gone, 0.0)


Forward = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]


def _forms(form: Form, chunk: int) -> Forward:
    if form in ("auto", "chunk"):
        return lambda q, k, v, decay, state: chunked(q, k, v, decay, state, chunk)
    if form == "parallel":
        return parallel
    if form == "scan":
        return scan
    raise ArgumentError("form", "'auto', 'parallel', 'chunk' or 'scan'", form)


def step(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: q, k (B,H,F), v (B,H,E), decay (B,H,1 or F), state (B,H,F,E)."""
    if decay is not None:
        state = state * decay.exp()[..., None]
    state = state + k[..., None] * v[..., None, :]
    return (q[..., None, :] @ state)[..., 0, :], state


def scan(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A loop of steps: the recurrence as it is written."""
    state = _initial(k, v) if state is None else state
    rows = []
    for t in range(q.shape[2]):
        o, state = step(
            q[:, :, t], k[:, :, t], v[:, :, t], None if decay is None else decay[:, :, t], state
        )
        rows.append(o)
    return (torch.stack(rows, 2) if rows else q.new_zeros(*q.shape[:3], v.shape[-1])), state


def parallel(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The quadratic definition: weights exp(G_i - G_j) q_i . k_j for j <= i, G the running sum of
    the log decay.
    """
    total = torch.zeros_like(q[..., :1]) if decay is None else decay.cumsum(2)
    rows = torch.arange(q.shape[2], device=q.device)
    past = rows[:, None] >= rows
    gap = (
        (total[:, :, :, None] - total[:, :, None])
        .masked_fill(~past[..., None], float("-inf"))
        .exp()
    )
    weights = torch.einsum("bhif,bhjf,bhijf->bhij", q, k, gap.expand(*gap.shape[:4], q.shape[-1]))
    o = weights @ v
    last = (
        total[:, :, -1:]
        if q.shape[2]
        else torch.zeros_like(q[:, :, :1, :1]).new_zeros(*q.shape[:2], 1, 1)
    )
    after = (k * (last - total).exp()).transpose(-1, -2) @ v
    if state is not None:
        o = o + (q * total.exp()) @ state
        after = after + state * last.exp().transpose(-1, -2)
    return o, after


def chunked(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """Matmuls inside blocks of `size` tokens, the state carried between blocks; linear in N."""
    n = q.shape[2]
    state = _initial(k, v) if state is None else state
    if n == 0:
        return q.new_zeros(*q.shape[:3], v.shape[-1]), state
    q, k, v = (_blocks(x, size) for x in (q, k, v))
    total = torch.zeros_like(q[..., :1]) if decay is None else _blocks(decay, size).cumsum(3)
    last = total[:, :, :, -1:]
    written = (k * (last - total).exp()).transpose(-1, -2) @ v
    kept = last.exp().transpose(-1, -2)
    before = []
    for block in range(q.shape[2]):
        before.append(state)
        state = state * kept[:, :, block] + written[:, :, block]
    o = _inside(q, k, total) @ v + (q * total.exp()) @ torch.stack(before, 2)
    return o.flatten(2, 3)[:, :, :n], state


def _inside(q: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """Causal decayed weights inside blocks (B,H,n,c,F) -> (B,H,n,c,c)."""
    rows = torch.arange(q.shape[3], device=q.device)
    future = rows[:, None] < rows
    if total.shape[-1] == 1:
        gap = (total - total.transpose(-1, -2)).masked_fill(future, float("-inf"))
        return (q @ k.transpose(-1, -2)) * gap.exp()
    gap = (total[..., :, None, :] - total[..., None, :, :]).masked_fill(
        future[..., None], float("-inf")
    )
    return torch.einsum("bhnif,bhnjf,bhnijf->bhnij", q, k, gap.exp())


def _blocks(x: Tensor, size: int) -> Tensor:
    fringe = -x.shape[2] % size
    return torch.nn.functional.pad(x, (0, 0, 0, fringe)).unflatten(2, (-1, size))


def _initial(k: Tensor, v: Tensor) -> Tensor:
    return k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
