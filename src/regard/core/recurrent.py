r"""Recurrent family: keys and values are written into a state of fixed size, queries read it.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

On request o_t is divided by the summed weights, z_t = q_t . sum_{j<=t} exp(g_{j+1} + … + g_t) k_j:
a column of ones in the values, which needs no code of its own. q (B,H,N,F) and k (B,H_k,N,F) are
features, already mapped; g <= 0 is the log decay, per head (H,), per token (B,H,N) or per channel
(B,H,N,F). The forms that compute it are in `regard.core.forms`; they agree. Without causality
there is one state for all queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.boundary import check_qkv, refuse
from regard.core.call import Call, Result
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.forms import chunked, parallel, scan, step_
from regard.core.mask import Causal
from regard.core.scored import without_padding
from regard.core.weights import repeat_heads

Form = Literal["auto", "parallel", "chunk", "scan"]


@dataclass(frozen=True, eq=False)
class Memory:
    """State of a recurrent mechanism after some tokens: S (B,H,F,E), in float32 at least, one
    column wider where it is normalised.

    spare: its owner needs it no more, so a step without gradients may overwrite it and saves the
    copy; what comes out of the step is spare as well.
    """

    content: Tensor
    spare: bool = False

    def handed_over(self) -> Memory:
        """The same memory, to be overwritten by the next step."""
        return replace(self, spare=True)


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
    (every query reads the whole state) or Causal(); `state` continues a causal call. Low precision
    is computed in float32. form: "auto" is "chunk", or "scan" for a single token.

    Raises:
        ArgumentError: shapes, dtypes or call fields that do not fit.
        UnsupportedError: another mask, a decay or a state in a noncausal call, or causal cross
            attention.
    """
    check_qkv(q, k, v, call)
    refuse(call, "a recurrent mechanism", "scale")
    causal, dtype = is_causal(call, "a recurrent mechanism"), q.dtype
    one = q.shape[2] == 1 and form == "auto"
    run = _form("scan" if one else form, method.chunk)
    q, k, v = (widened(x) for x in without_padding(q, k, v, call))
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    if method.normalise:
        v = F.pad(v, (0, 1), value=1.0)
    if causal:
        decay = token_decay(method.log_decay, q, call)
        content = continued(q, k, v, state, "a recurrent mechanism")
        if one and overwritable(state, q, k, v, decay):
            run = step_
        o, content = run(q, k, v, decay, content) if q.shape[2] else (torch.zeros_like(v), content)
        after = Memory(content, state is not None and state.spare)
    elif method.log_decay is not None or state is not None:
        raise UnsupportedError(
            "a recurrent mechanism", "decay and carried state need a causal mask"
        )
    else:
        o = (q @ k.mT) @ v if form == "parallel" else q @ (k.mT @ v)
        after = None
    if method.normalise:
        o = o[..., :-1] * inverse(o[..., -1:] + method.eps)
    if call.query_padding is not None:
        o = o.masked_fill(~call.query_padding[:, None, :, None], 0.0)
    return Result(o.to(dtype), state=after)


def is_causal(call: Call, who: str) -> bool:
    """Whether the call is causal; a mask other than Causal() is refused in the name of `who`."""
    if call.mask is None:
        return False
    if call.mask == Causal():
        return True
    raise UnsupportedError(
        who, f"a state cannot honour the mask {type(call.mask).__name__}; only None or Causal()"
    )


def widened(x: Tensor) -> Tensor:
    """x in float32 at least: running sums over many tokens need the digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inverse(total: Tensor) -> Tensor:
    """1 / total, and 0 where the total is 0, with finite gradients."""
    nothing = total == 0
    return total.masked_fill(nothing, 1.0).reciprocal().masked_fill(nothing, 0.0)


Forward = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]


def _form(form: Form, chunk: int) -> Forward:
    if chunk < 1:
        raise ArgumentError("chunk", "at least 1", chunk)
    if form == "scan":
        return scan
    if form in ("auto", "chunk"):
        return lambda q, k, v, decay, state: chunked(q, k, v, decay, state, chunk)
    if form == "parallel":
        return parallel
    raise ArgumentError("form", "'auto', 'parallel', 'chunk' or 'scan'", form)


def continued(q: Tensor, k: Tensor, v: Tensor, state: Memory | None, who: str) -> Tensor:
    """The state (B,H,F,E) a causal call starts with; unequal queries and keys are refused."""
    if q.shape[2] != k.shape[2]:
        raise UnsupportedError(who, f"causal with {q.shape[2]} queries and {k.shape[2]} keys")
    shape = (*k.shape[:2], k.shape[3], v.shape[3])
    if state is None:
        return k.new_zeros(shape)
    if tuple(state.content.shape) != shape:
        raise ArgumentError("state.content", f"shape {shape}", tuple(state.content.shape))
    return state.content


def overwritable(state: Memory | None, *inputs: Tensor | None) -> bool:
    """Whether a step on these inputs may overwrite the state: it is spare and nothing is recorded
    for gradients.
    """
    if state is None or not state.spare:
        return False
    every = (state.content, *(x for x in inputs if x is not None))
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in every))


def token_decay(log_decay: Tensor | None, q: Tensor, call: Call) -> Tensor | None:
    """Log decay as (1,H,1,1) where it is the same for all tokens, else as (B,H,N,1 or F); no time
    passes during padding.
    """
    if log_decay is None:
        return None
    if log_decay.shape not in (q.shape[1:2], q.shape[:3], q.shape):
        expected = f"{tuple(q.shape[1:2])}, {tuple(q.shape[:3])} or {tuple(q.shape)}"
        raise ArgumentError("log_decay", expected, tuple(log_decay.shape))
    decay = log_decay.to(q.dtype)
    if decay.ndim == 1:
        decay = decay[None, :, None, None]
    elif decay.ndim == 3:
        decay = decay[..., None]
    if call.padding is None:
        return decay
    return decay.masked_fill(~call.padding[:, None, :, None], 0.0)
