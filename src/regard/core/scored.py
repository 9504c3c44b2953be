r"""Scored family: every visible key is scored, a normaliser turns scores into weights.

    s_ij = score(q_i . k_j * scale + bias_j)
    a_i = normalise(s_i, visible_i, n_i)
    o_i = sum_j a_ij v_j

A method is a `Scored` record; `attend` runs it. `dense` is the definition of truth; `sdpa` serves
plain softmax calls; `tiled` visits only blocks that somebody sees and never holds an N x M matrix;
`flex` is PyTorch's compiled kernel for any softmax mechanism; `split` reads many keys for a few
queries, as in decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.blocks import tiles_of
from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.decoding import run_splits, split_serves
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.flexed import Flexed, flex_lacks, run_flex
from regard.core.mask import Causal, Mask
from regard.core.tiled import run_tiles
from regard.core.unit import Work
from regard.core.weights import (
    Scored,
    Softmax,
    group_scores,
    group_values,
    modified_scores,
    normalised,
    repeat_heads,
    scale_of,
)

Impl = Literal["auto", "dense", "sdpa", "tiled", "flex", "split"]
TILED_FROM = 512
"""Queries and keys from which `auto` prefers tiles to a whole matrix."""


class Decision(NamedTuple):
    """Which executor serves a call, and why."""

    impl: Impl
    reason: str


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    method: Scored,
    *,
    impl: Impl = "auto",
    need_lse: bool = False,
) -> Result:
    """Run a scored mechanism on q (B,H,N,D), k (B,H_k,M,D), v (B,H_v,M,E); output (B,H,N,E), lse
    (B,H,N) on request.

    Raises:
        ArgumentError: shapes, dtypes or call fields that do not fit.
        UnsupportedError: `impl` cannot serve the call.
    """
    check_qkv(q, k, v, call)
    choice = decide(q, k, call, method, need_lse) if impl == "auto" else Decision(impl, "asked for")
    call.note("executor", choice)
    impl = choice.impl
    if impl != "split" or torch.is_grad_enabled():  # without gradients splits read around padding
        q, k, v = without_padding(q, k, v, call)
    if impl == "dense":
        result = _dense(q, k, v, call, method, need_lse)
    elif impl == "sdpa":
        lacks = _sdpa_lacks(method, need_lse)
        if lacks:
            raise UnsupportedError("impl='sdpa'", lacks)
        result = Result(_sdpa(q, k, v, call, method))
    elif impl == "tiled":
        result = _tiled(q, k, v, call, method, need_lse)
    elif impl == "flex":
        result = _flex(q, k, v, call, method, need_lse)
    elif impl == "split":
        result = run_splits(q, k, v, call, method, need_lse)
    else:
        raise ArgumentError("impl", "'auto', 'dense', 'sdpa', 'tiled', 'flex' or 'split'", impl)
    return _blank_padded_queries(result, call)


def decide(q: Tensor, k: Tensor, call: Call, method: Scored, need_lse: bool = False) -> Decision:
    """What `impl="auto"` picks for these shapes, and why."""
    if split_serves(q, k, method):
        return Decision(
            "split", "one query, many keys: splits read them at nearly the rate of memory"
        )
    lacks = _sdpa_lacks(method, need_lse)
    if not lacks and _is_plain(q, k, call, method):
        return Decision("sdpa", "plain softmax, causal or not: the fused kernel is the fastest")
    long = min(q.shape[2], k.shape[2]) >= TILED_FROM and not torch.compiler.is_compiling()
    if long and q.device.type == "cuda" and not flex_lacks(q, k, k, method, need_lse):
        return Decision("flex", "a mask, bias or score on a GPU: the compiled kernel skips blocks")
    if long:
        return Decision(
            "tiled", lacks or "a mask or bias at this length: tiles skip what is hidden"
        )
    if lacks or 0 in (k.shape[2], q.shape[2]):
        return Decision("dense", lacks or "there is nothing to attend to")
    return Decision("sdpa", "softmax with a mask or bias, too short for tiles to pay")


def executor_lacks(
    impl: Impl, q: Tensor, k: Tensor, v: Tensor, method: Scored, need_lse: bool = False
) -> str:
    """Why an executor cannot serve a mechanism on these tensors, or an empty string."""
    if impl == "sdpa":
        return _sdpa_lacks(method, need_lse)
    return flex_lacks(q, k, v, method, need_lse) if impl == "flex" else ""


def explain(run: Callable[[Call], Any], call: Call = Call()) -> list[Decision]:
    """Which executor serves each attention call that `run` makes, and why.

    `run` gets the call to pass on: `explain(lambda call: layer(x, call), Call(mask=Causal()))`.
    """
    notes: dict[str, list[Any]] = {}
    with torch.no_grad():
        run(call.but(notes=notes))
    return notes.get("executor", [])


def without_padding(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with padded rows set to zero, so that whatever they held, NaN included, cannot reach
    a result or gradient.
    """
    if call.padding is not None and not all_real(call.padding):
        gone = ~call.padding[:, None, :, None]
        k, v = k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)
    if call.query_padding is not None:
        q = q.masked_fill(~call.query_padding[:, None, :, None], 0.0)
    return q, k, v


def all_real(padding: Tensor) -> bool:
    """Whether padding is known to hide nothing, where a look at it costs little."""
    if padding.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(padding.all())


def _blank_padded_queries(result: Result, call: Call) -> Result:
    if call.query_padding is None:
        return result
    gone = ~call.query_padding[:, None, :]
    lse = None if result.lse is None else result.lse.masked_fill(gone, float("-inf"))
    return Result(result.output.masked_fill(gone[..., None], 0.0), lse, result.state)


def _dense(q: Tensor, k: Tensor, v: Tensor, call: Call, method: Scored, need_lse: bool) -> Result:
    frame = call.frame(q, k)
    scores = group_scores(q, k) * scale_of(call, method.scale, q.shape[-1])
    scores = modified_scores(scores, method, frame.all(), q)
    mask = call.visibility(method.mask)
    if mask is None:
        visible = torch.ones_like(scores[:1, :1], dtype=torch.bool)
    else:
        visible = mask.dense(frame)
    weights, lse = normalised(scores, visible, method.normalise, need_lse)
    return Result(group_values(weights, v), lse)


def _sdpa_lacks(method: Scored, need_lse: bool) -> str:
    """Why scaled_dot_product_attention cannot serve, or an empty string."""
    if not isinstance(method.normalise, Softmax):
        return f"its normaliser is softmax, not {type(method.normalise).__name__}"
    if method.score is not None or method.block_bias is not None:
        return "it takes no score modification"
    return "it returns no log-sum-exp" if need_lse else ""


def _is_plain(q: Tensor, k: Tensor, call: Call, method: Scored) -> bool:
    """Whether the fused kernel needs no mask tensor and no bias."""
    if method.key_bias is not None or 0 in (q.shape[2], k.shape[2]):
        return False
    mask = call.visibility(method.mask)
    if mask is None:
        return True
    aligned = call.query_positions is None and call.key_positions is None
    return mask == Causal() and aligned and q.shape[2] == k.shape[2]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, call: Call, method: Scored) -> Tensor:
    scale = scale_of(call, method.scale, q.shape[-1])
    if scale == 0:  # the fused kernels multiply their own -inf by the scale
        q, scale = q * 0, 1.0
    grouped = k.shape[1] != q.shape[1] and k.shape[1] == v.shape[1]
    if not grouped:
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    mask = call.visibility(method.mask)
    if mask is not None and q.shape[2] == 1 and _all_seen(mask, q, k, call):
        mask = None  # decoding: the newest token sees the whole cache
    if method.key_bias is None and (mask is None or _is_plain(q, k, call, method)):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=mask is not None, scale=scale, enable_gqa=grouped
        )
    bias = None if mask is None else mask.dense(call.frame(q, k))
    if method.key_bias is not None:
        extra = method.key_bias[..., None, :].expand(-1, -1, q.shape[2], -1).to(q.dtype)
        bias = extra if bias is None else extra.masked_fill(~bias, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=grouped)


def _all_seen(mask: Mask, q: Tensor, k: Tensor, call: Call) -> bool:
    """Whether every pair is surely visible, judged by intervals of positions (one block)."""
    if torch.compiler.is_compiling():
        return False
    tiles = tiles_of(call.frame(q, k), q.shape[2], k.shape[2])
    return bool(mask.bounds(tiles)[1].all())


def _tiled(q: Tensor, k: Tensor, v: Tensor, call: Call, method: Scored, need_lse: bool) -> Result:
    if k.shape[1] != v.shape[1]:
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    frame, mask = call.frame(q, k), call.visibility(method.mask)
    scale = scale_of(call, method.scale, q.shape[-1])
    if scale == 0:
        q, scale = q * 0, 1.0
    group = q.shape[1] // k.shape[1]
    return Result(*run_tiles(q, k, v, Work.of(frame, mask, method, scale, need_lse, group)))


def _flex(q: Tensor, k: Tensor, v: Tensor, call: Call, method: Scored, need_lse: bool) -> Result:
    lacks = flex_lacks(q, k, v, method, need_lse)
    if lacks:
        raise UnsupportedError("impl='flex'", lacks)
    if k.shape[1] != v.shape[1]:
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    scale = scale_of(call, method.scale, q.shape[-1])
    mask = call.visibility(method.mask)
    return Result(*run_flex(q, k, v, Flexed(call.frame(q, k), mask, method, scale, need_lse)))
