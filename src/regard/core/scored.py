r"""Scored family: every visible key is scored, a normaliser turns scores into weights.

    s_ij = score(q_i . k_j * scale + bias_j)      a_i = normalise(s_i, visible_i, n_i)      o_i =
    sum_j a_ij v_j

A method is a `Scored` record; `attend` runs it. `dense` is the definition of truth; `sdpa` serves
plain softmax calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mask import Causal, Mask, Pairs

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Impl = Literal["auto", "dense", "sdpa"]


class Normaliser(Protocol):
    """Scores (…,N,M), visibility (broadcastable) and the visible count (…,N,1) to weights;
    invisible keys weigh zero.

    kind: "additive" (a plain sum over keys), "online" (running max and sum, so results merge by
    log-sum-exp) or "two_pass" (a row must be seen twice). A tiled executor reads it.
    """

    @property
    def kind(self) -> Literal["additive", "online", "two_pass"]: ...

    def __call__(self, scores: Tensor, visible: Tensor, count: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Softmax:
    """exp(s_ij) / sum_j exp(s_ij) over visible keys; a row without any gives zeros."""

    kind: Literal["online"] = "online"

    def __call__(self, scores: Tensor, visible: Tensor, count: Tensor) -> Tensor:
        empty = count == 0
        safe = scores.masked_fill(~visible, float("-inf")).masked_fill(empty, 0.0)
        return torch.softmax(safe, dim=-1).masked_fill(empty, 0.0)


@dataclass(frozen=True, eq=False)
class Scored:
    """One scored mechanism, as data.

    normalise: scores to weights. score: flex_attention's score_mod (score, b, h, q_idx, kv_idx),
    applied after scale and key_bias. mask: the mechanism's own visibility, in conjunction with the
    call's. key_bias: (B or 1, H or 1, M), added to the scaled scores (a pooled key that stands for
    c tokens carries log c). scale: used unless the call brings one.
    """

    normalise: Normaliser = field(default_factory=lambda: Softmax())  # a class stops dynamo
    score: ScoreMod | None = None
    mask: Mask | None = None
    key_bias: Tensor | None = None
    scale: float | None = None


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
    q, k, v = without_padding(q, k, v, call)
    lacks = _sdpa_lacks(method, need_lse)
    if impl == "auto":
        impl = "dense" if lacks or k.shape[2] == 0 else "sdpa"
    if impl == "dense":
        result = _dense(q, k, v, call, method, need_lse)
    elif impl == "sdpa":
        if lacks:
            raise UnsupportedError("impl='sdpa'", lacks)
        result = Result(_sdpa(q, k, v, call, method))
    else:
        raise ArgumentError("impl", "'auto', 'dense' or 'sdpa'", impl)
    return _blank_padded_queries(result, call)


def without_padding(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with padded rows set to zero, so that whatever they held, NaN included, cannot reach
    a result or gradient.
    """
    if call.padding is not None:
        gone = ~call.padding[:, None, :, None]
        k, v = k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)
    if call.query_padding is not None:
        q = q.masked_fill(~call.query_padding[:, None, :, None], 0.0)
    return q, k, v


def _blank_padded_queries(result: Result, call: Call) -> Result:
    if call.query_padding is None:
        return result
    gone = ~call.query_padding[:, None, :]
    lse = None if result.lse is None else result.lse.masked_fill(gone, float("-inf"))
    return Result(result.output.masked_fill(gone[..., None], 0.0), lse, result.state)


def scale_of(call: Call, method_scale: float | None, width: int) -> float:
    """The factor on q·k: the call's, else the method's, else 1/sqrt(D)."""
    if call.scale is not None:
        return call.scale
    return width**-0.5 if method_scale is None else method_scale


def _dense(q: Tensor, k: Tensor, v: Tensor, call: Call, method: Scored, need_lse: bool) -> Result:
    frame = call.frame(q, k)
    pairs = frame.all()
    scores = modified_scores(
        group_scores(q, k) * scale_of(call, method.scale, q.shape[-1]), method, pairs
    )
    mask = call.visibility(method.mask)
    visible = (
        mask.dense(frame) if mask is not None else torch.ones_like(scores[:1, :1], dtype=torch.bool)
    )
    weights, lse = normalised(scores, visible, method.normalise, need_lse)
    return Result(group_values(weights, v), lse)


def modified_scores(scores: Tensor, method: Scored, pairs: Pairs) -> Tensor:
    """Scores (…,N,M) after the method's key bias and score modification at the given pairs."""
    if method.key_bias is not None:
        scores = scores + method.key_bias[..., None, :]
    if method.score is not None:
        scores = method.score(scores, pairs.b, pairs.h, pairs.query_index, pairs.key_index)
    return scores


def normalised(
    scores: Tensor, visible: Tensor, rule: Normaliser, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Weights (…,N,M) and, on request, the row log-sum-exp (…,N) of the visible scores."""
    count = visible.sum(-1, keepdim=True)
    weights = rule(scores, visible, count)
    if not need_lse:
        return weights, None
    if rule.kind != "online":
        raise UnsupportedError(
            type(rule).__name__, "it has no log-sum-exp; its parts do not merge by one"
        )
    return weights, masked_lse(scores, visible)


def masked_lse(scores: Tensor, visible: Tensor) -> Tensor:
    """log sum_j exp(s_ij) over visible keys, (…,N,M) -> (…,N); -inf for an empty row, with finite
    gradients.
    """
    empty = ~visible.any(-1).expand(scores.shape[:-1])
    safe = scores.masked_fill(~visible, float("-inf")).masked_fill(empty[..., None], 0.0)
    return torch.logsumexp(safe, -1).masked_fill(empty, float("-inf"))


def group_scores(q: Tensor, k: Tensor) -> Tensor:
    """q (B,H,N,D) · k (B,H_k,M,D) -> (B,H,N,M); groups fold into rows, so no key is copied."""
    b, h, n, d = q.shape
    folded = q.reshape(b, k.shape[1], h // k.shape[1] * n, d)
    return (folded @ k.transpose(-1, -2)).reshape(b, h, n, k.shape[2])


def group_values(weights: Tensor, v: Tensor) -> Tensor:
    """Weights (B,H,N,M) · v (B,H_v,M,E) -> (B,H,N,E); grouped heads fold into rows."""
    b, h, n, m = weights.shape
    folded = weights.reshape(b, v.shape[1], h // v.shape[1] * n, m)
    return (folded @ v).reshape(b, h, n, v.shape[3])


def _sdpa_lacks(method: Scored, need_lse: bool) -> str:
    """Why scaled_dot_product_attention cannot serve, or an empty string."""
    if not isinstance(method.normalise, Softmax):
        return f"its normaliser is softmax, not {type(method.normalise).__name__}"
    if method.score is not None:
        return "it takes no score modification"
    return "it returns no log-sum-exp" if need_lse else ""


def _sdpa(q: Tensor, k: Tensor, v: Tensor, call: Call, method: Scored) -> Tensor:
    scale = scale_of(call, method.scale, q.shape[-1])
    if scale == 0:  # the fused kernels multiply their own -inf by the scale
        q, scale = q * 0, 1.0
    grouped = k.shape[1] != q.shape[1] and k.shape[1] == v.shape[1]
    if not grouped:
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    mask = call.visibility(method.mask)
    plain = method.key_bias is None and call.query_positions is None and call.key_positions is None
    if plain and (mask is None or (mask == Causal() and q.shape[2] == k.shape[2])):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=mask is not None, scale=scale, enable_gqa=grouped
        )
    bias = None if mask is None else mask.dense(call.frame(q, k))
    if method.key_bias is not None:
        extra = method.key_bias[..., None, :].expand(-1, -1, q.shape[2], -1).to(q.dtype)
        bias = extra if bias is None else extra.masked_fill(~bias, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=grouped)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(B,H_x,M,D) -> (B,heads,M,D): each head repeated for its group of query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
