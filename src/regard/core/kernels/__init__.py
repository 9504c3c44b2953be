"""GPU kernels in Triton, for what no fused kernel of PyTorch computes: calls in, results out.

Nothing here imports triton before a call asks for it. A call that the kernels cannot serve is
refused by an error that names what is lacking. On a machine without a GPU they run, slowly, in
Triton's interpreter: set TRITON_INTERPRET=1 before the first use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.boundary import refuse
from regard.core.call import Call, Result
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mask import Causal
from regard.core.recurrent import Memory
from regard.core.scored import without_padding
from regard.core.weights import group_scores, group_values, repeat_heads

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WIDTHS = (16, 32, 64, 128, 256)
_CHUNKS = (16, 32, 64)
_FARTHEST = 2**31 - 1  # int32, which nobody sees


def sigmoid_sum(
    q: Tensor, k: Tensor, v: Tensor, call: Call, *, bias: float | None = None, power: float = 0.0
) -> Result:
    """sum_j sigma(s q_i . k_j + bias) v_j / n_i^power over the n_i keys that query i sees; bias
    None = -ln n_i.

    q (B,H,N,D), k (B,H_k,M,D), v (B,H_v,M,E), already checked -> output (B,H,N,E).

    Raises:
        UnsupportedError: no triton, no device, dtype, width, or a mask but None and Causal().
    """
    _check_machine("impl='triton'", q, v)
    if call.mask is not None and call.mask != Causal():
        name = type(call.mask).__name__
        raise UnsupportedError("impl='triton'", f"it knows the masks None and Causal(), not {name}")
    q, k, v = without_padding(q, k, v, call)
    if k.shape[1] != v.shape[1]:
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    if 0 in (q.shape[0], q.shape[2], k.shape[2]):
        return Result(group_values(group_scores(q, k), v))
    reach, count = _reach(q, k, call)
    seen = count.clamp_min(1).float()
    shift = -seen.log() if bias is None else torch.full_like(seen, bias)
    scale = q.shape[3] ** -0.5 if call.scale is None else call.scale
    from regard.core.kernels.elementwise import sigmoid_attention

    o = sigmoid_attention(q, k, v, shift, reach, scale)
    if power:
        o = o / (seen**power).to(o.dtype)[:, None, :, None]
    if call.query_padding is not None:
        o = o.masked_fill(~call.query_padding[:, None, :, None], 0.0)
    return Result(o)


def decayed_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    log_decay: Tensor | None,
    chunk: int = 64,
    state: Memory | None = None,
) -> Result:
    """sum_{j<=i} e^{g (t_i - t_j)} (q_i . k_j) v_j with one log decay g <= 0 per head, (H,), which
    gets no gradient; None = no decay. Padding takes no time.

    q (B,H,N,D), k (B,H_k,N,D), v (B,H_v,N,E) of a causal call, already checked -> output (B,H,N,E)
    and the state after the last token.

    Raises:
        ArgumentError: a state of another shape.
        UnsupportedError: no triton, no device, dtype, width, chunk, scale or cross attention.
    """
    _check_machine("form='triton'", q, v)
    refuse(call, "form='triton'", "scale")
    if chunk not in _CHUNKS:
        raise UnsupportedError("form='triton'", f"its chunks are {_CHUNKS} long, not {chunk}")
    (batch, heads, n, d), e = q.shape, v.shape[3]
    if k.shape[2] != n:
        raise UnsupportedError("form='triton'", f"causal with {n} queries and {k.shape[2]} keys")
    if state is not None and tuple(state.content.shape) != (batch, heads, d, e):
        raise ArgumentError(
            "state.content", f"shape {(batch, heads, d, e)}", tuple(state.content.shape)
        )
    q, k, v = without_padding(q, k, v, call)
    content = q.new_zeros(batch, heads, d, e) if state is None else state.content
    content = content.float().contiguous()
    if 0 in (batch, n):
        return Result(q.new_zeros(batch, heads, n, e), state=Memory(content))
    if call.padding is None:
        clock = torch.arange(1, n + 1, device=q.device).expand(batch, -1)
    else:
        clock = call.padding.cumsum(-1)
    # what e^-1e4 leaves is 0 already; -inf times no time would be NaN
    decay = q.new_zeros(heads) if log_decay is None else log_decay.detach().clamp_min(-1e4)
    from regard.core.kernels.decay import decayed_attention

    pace = [clock.to(torch.int32).contiguous(), decay.float().contiguous()]
    o, after = decayed_attention(q, k, v, content, pace, chunk)
    if call.query_padding is not None:
        o = o.masked_fill(~call.query_padding[:, None, :, None], 0.0)
    return Result(o, state=Memory(after))


def _check_machine(who: str, q: Tensor, v: Tensor) -> None:
    """Raise UnsupportedError unless kernels can run on these tensors, here and now."""
    try:
        from regard.core.kernels.tiles import INTERPRETED
    except ImportError as error:
        raise UnsupportedError(who, "triton is not installed (the extra `triton`)") from error
    if q.device.type != "cuda" and not INTERPRETED:
        raise UnsupportedError(
            who,
            f"it needs a CUDA device, not {q.device.type}, or Triton's interpreter"
            " (TRITON_INTERPRET=1, set before the first use)",
        )
    if q.dtype not in _DTYPES:
        raise UnsupportedError(who, f"it computes float32, float16 and bfloat16, not {q.dtype}")
    for name, width in (("q and k", q.shape[3]), ("v", v.shape[3])):
        if width not in _WIDTHS:
            raise UnsupportedError(
                who, f"heads must be a power of two from 16 to 256 wide; {name} are {width}"
            )


def _reach(q: Tensor, k: Tensor, call: Call) -> tuple[list[Tensor], Tensor]:
    """Who sees whom, as the fields of a `Reach`, and how many keys each query sees, (B,N)."""
    batch, n, m = q.shape[0], q.shape[2], k.shape[2]
    if call.mask is None:
        queries, keys = q.new_zeros(1, n), q.new_zeros(1, m)
    else:
        queries, keys = call.positions(n, m, q.device)
    limits = (-_FARTHEST, _FARTHEST - 1)
    queries = queries.clamp(*limits).to(torch.int32).expand(batch, -1).contiguous()
    keys = keys.clamp(*limits).to(torch.int32).expand(batch, -1).contiguous()
    if call.padding is not None:
        keys = keys.masked_fill(~call.padding, _FARTHEST)
    later = keys.flip(-1).cummin(-1).values.flip(-1).contiguous()  # least number from here on
    earlier = queries.cummax(-1).values  # greatest number up to here
    last = torch.searchsorted(later, queries, right=True, out_int32=True)
    first = torch.searchsorted(earlier, keys, out_int32=True)
    count = torch.searchsorted(keys.sort(-1).values, queries, right=True)
    return [queries, keys, last, first], count
