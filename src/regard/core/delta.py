r"""Delta-rule memory: a write first takes back what the state already answers to its key.

    S_t = e^{g_t} (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t

q, k (B,H,N,F), v (B,H,N,E), S (B,H,F,E); beta (B,H,N) is how much of the old answer is replaced, 1
all of it; g <= 0 is the log decay, per head (H,), per token (B,H,N) or None. Keys are expected at
length one (`unit`), else beta |k|^2 must not exceed 2. The forms are in `regard.core.delta_forms`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.core.boundary import check_qkv, refuse
from regard.core.call import Call, Result
from regard.core.delta_forms import delta_chunked, delta_scan, delta_step_
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.recurrent import (
    Memory,
    continued,
    is_causal,
    overwritable,
    token_decay,
    widened,
)
from regard.core.scored import without_padding
from regard.core.weights import repeat_heads

DeltaForm = Literal["auto", "chunk", "scan"]


@dataclass(frozen=True, eq=False)
class DeltaRule:
    """One delta-rule mechanism, as data: beta (B,H,N); log_decay (H,), (B,H,N) or None = nothing is
    forgotten; chunk, the block length of the `chunk` form.
    """

    beta: Tensor
    log_decay: Tensor | None = None
    chunk: int = 32


def unit(x: Tensor) -> Tensor:
    """Rows (…,D) at length one, x / sqrt(|x|^2 + 1e-6): smooth, and zero stays zero."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    method: DeltaRule,
    *,
    state: Memory | None = None,
    form: DeltaForm = "auto",
) -> Result:
    """Run a delta-rule mechanism; Result.state is the memory after the last token.

    q (B,H,N,F), k (B,H_k,N,F), v (B,H_v,N,E) -> output (B,H,N,E). Padded tokens write nothing and
    let no time pass. Low precision is computed in float32. form: "auto" is "chunk", or "scan" for a
    single token.

    Raises:
        ArgumentError: shapes, dtypes or call fields that do not fit.
        UnsupportedError: a mask other than Causal(), or as many queries as keys missing.
    """
    who, dtype = "a delta rule", q.dtype
    check_qkv(q, k, v, call)
    refuse(call, who, "scale")
    if not is_causal(call, who):
        raise UnsupportedError(who, "writes follow each other in time (mask=Causal())")
    one = q.shape[2] == 1 and form == "auto"
    run = _form("scan" if one else form, method.chunk)
    q, k, v = (widened(x) for x in without_padding(q, k, v, call))
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    content = continued(q, k, v, state, who)
    beta, decay = _rates(method, q, call)
    if one and overwritable(state, q, k, v, beta, decay):
        run = delta_step_
    o = torch.zeros_like(v)
    if q.shape[2] > 0:
        o, content = run(q, k, v, beta, decay, content)
    if call.query_padding is not None:
        o = o.masked_fill(~call.query_padding[:, None, :, None], 0.0)
    return Result(o.to(dtype), state=Memory(content, state is not None and state.spare))


Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]


def _form(form: DeltaForm, chunk: int) -> Forward:
    if chunk < 1:
        raise ArgumentError("chunk", "at least 1", chunk)
    if form == "scan":
        return delta_scan
    if form in ("auto", "chunk"):
        return lambda q, k, v, beta, decay, state: delta_chunked(q, k, v, beta, decay, state, chunk)
    raise ArgumentError("form", "'auto', 'chunk' or 'scan'", form)


def _rates(method: DeltaRule, q: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """beta (B,H,N,1), 0 at padding, and the log decay (see `token_decay`)."""
    if method.beta.shape != q.shape[:3]:
        raise ArgumentError("beta", f"shape {tuple(q.shape[:3])}", tuple(method.beta.shape))
    if method.log_decay is not None and method.log_decay.ndim == 4:
        found = tuple(method.log_decay.shape)
        raise ArgumentError("log_decay", f"{tuple(q.shape[1:2])} or {tuple(q.shape[:3])}", found)
    beta = method.beta.to(q.dtype)[..., None]
    if call.padding is not None:
        beta = beta.masked_fill(~call.padding[:, None, :, None], 0.0)
    return beta, token_decay(method.log_decay, q, call)
