r"""Scores to weights: the record of a scored mechanism, its normalisers, and products over grouped
heads, shared by every executor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.call import Call
from regard.core.errors import UnsupportedError
from regard.core.frame import Pairs
from regard.core.mask import Mask

BlockBias = Callable[[Tensor, Pairs], tuple[int, Tensor]]
"""What a block of queries (B,h,n,D) adds to its scores with the keys of these pairs: the number of
the first key that gets anything, and what it and those after it get, (B,h,n,w).
"""

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Normaliser(Protocol):
    """Scores (…,N,M), visibility (broadcastable) and the visible count (…,N,1) to weights;
    invisible keys weigh zero.

    kind: "additive" (a plain sum over keys), "online" (running max and sum, so results merge by
    log-sum-exp) or "two_pass" (a row must be seen twice). Without gradients an additive one may
    overwrite the scores.
    """

    @property
    def kind(self) -> Literal["additive", "online", "two_pass"]: ...

    def __call__(self, scores: Tensor, visible: Tensor, count: Tensor) -> Tensor: ...


class Additive(Normaliser, Protocol):
    """A normaliser of kind "additive"; visible is None where the executor masks what it gives."""

    def __call__(self, scores: Tensor, visible: Tensor | None, count: Tensor) -> Tensor: ...


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
    c tokens carries log c). scale: used unless the call brings one. captures: tensors that score or
    normalise close over and that need gradients (an executor with its own backward must know them).
    block_bias: a bias that depends on the query, computed block by block and added before score.
    """

    normalise: Normaliser = field(default_factory=lambda: Softmax())  # a class stops dynamo
    score: ScoreMod | None = None
    mask: Mask | None = None
    key_bias: Tensor | None = None
    scale: float | None = None
    captures: tuple[Tensor, ...] = ()
    block_bias: BlockBias | None = None


def scale_of(call: Call, method_scale: float | None, width: int) -> float:
    """The factor on q·k: the call's, else the method's, else 1/sqrt(D)."""
    if call.scale is not None:
        return call.scale
    return width**-0.5 if method_scale is None else method_scale


def modified_scores(scores: Tensor, method: Scored, pairs: Pairs, q: Tensor) -> Tensor:
    """Scores (…,N,M) of queries q (…,N,D) after the method's biases and score modification."""
    bias = summed_bias(method, q, pairs)
    if bias is not None:
        scores = scores + bias
    if method.score is not None:
        scores = method.score(scores, pairs.b, pairs.h, pairs.query_index, pairs.key_index)
    return scores


def summed_bias(method: Scored, q: Tensor, pairs: Pairs | None) -> Tensor | None:
    """What is added to the scaled scores, broadcastable to (…,N,M); pairs only for block_bias."""
    bias = None if method.key_bias is None else method.key_bias[..., None, :]
    if method.block_bias is None or pairs is None:
        return bias
    first, own = method.block_bias(q, pairs)
    own = F.pad(own, (first, pairs.key.shape[-1] - first - own.shape[-1]))
    return own if bias is None else own + bias


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


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(B,H_x,M,D) -> (B,heads,M,D): each head repeated for its group of query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
