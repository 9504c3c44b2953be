r"""Split executor: few queries against many keys, every visible key and value read once, at nearly
the rate of memory.

    s = (K q^T)^T scale        a = normalise(s)        o = sum_c sum_{j in split c} a_j v_j

q: (B,H,N,D)  k: (B,H_k,M,D)  v: (B,H_v,M,E). W visible keys are B W (H_k D + H_v E) numbers read;
the scores are whole rows of B H N W numbers, so any normaliser serves. Keys stand as the rows of
the product, which reads them faster than columns; values are summed in bags, one per split of the
keys, shared out evenly among the threads whatever the number of heads (2405.10480). Bags name their
rows, so that hidden keys between visible ones are never read, nor what padding holds.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from regard.core.blocks import tiles_of
from regard.core.call import Call, Result
from regard.core.frame import Frame, Pairs
from regard.core.mask import Mask
from regard.core.rows import value_sums
from regard.core.weights import Scored, Softmax, modified_scores, normalised, scale_of

SPAN = 512
"""Keys that are read or passed over together."""
SPLIT_FROM = 4096
"""Keys from which `auto` prefers splits."""
SPLIT_FROM_HALF = 1024
"""The same for half precision, whose fused kernel is the slower one."""

Span = tuple[slice, bool]
"""Keys start..stop-1 and whether every query surely sees all of them."""


def split_serves(q: Tensor, k: Tensor, method: Scored) -> bool:
    """Whether `auto` takes splits: one query and many keys, on a CPU, without gradients."""
    least = SPLIT_FROM_HALF if q.element_size() < 4 else SPLIT_FROM
    return k.shape[2] >= least and reads_for_one(q, k, *method.captures)


def reads_for_one(q: Tensor, k: Tensor, *others: Tensor) -> bool:
    """Whether one query per head waits for a CPU to read keys, and nothing wants a gradient."""
    if torch.compiler.is_compiling() or q.device.type != "cpu" or q.shape[2] != 1:
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, *others)))


def run_splits(
    q: Tensor, k: Tensor, v: Tensor, call: Call, method: Scored, need_lse: bool
) -> Result:
    """Output (B,H,N,E) and, on request, log-sum-exp (B,H,N). What padded rows hold never reaches a
    result; where gradients are wanted, they must be finite.
    """
    frame, mask = call.frame(q, k), call.visibility(method.mask)
    spans = spans_of(mask, frame)
    scale = scale_of(call, method.scale, q.shape[-1])
    parts = [_scores(q, k, method, scale, frame, keys) for keys, _ in spans]
    scores = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    visible = _visible(mask, frame, spans)
    weights, lse = _weights(scores, visible, method, need_lse)
    if visible is None:
        return Result(value_sums(weights, v, _rows(spans, None, q.device)), lse)
    output = value_sums(weights, v, _rows(spans, call.padding, q.device))
    return Result(output.masked_fill(~visible.any(-1, keepdim=True), 0.0), lse)


def spans_of(mask: Mask | None, frame: Frame) -> list[Span]:
    """The keys that some query may see, as neighbouring splits in one."""
    n, m = frame.query_positions.shape[-1], frame.key_positions.shape[-1]
    if mask is None or 0 in (n, m) or bool(mask.bounds(tiles_of(frame, n, m))[1].all()):
        return [(slice(0, m), True)]
    size = min(SPAN, m)
    some, full = mask.bounds(tiles_of(frame, n, size))
    shape = torch.broadcast_shapes(some.shape, full.shape, (1, 1, 1, -(-m // size)))
    some, full = some.expand(shape).flatten(0, 2).any(0), full.expand(shape).flatten(0, 2).all(0)
    found: list[Span] = []
    for split, (needed, whole) in enumerate(zip(some.tolist(), full.tolist(), strict=True)):
        start, stop = split * size, min((split + 1) * size, m)
        if needed and found and found[-1] == (slice(found[-1][0].start, start), whole):
            found[-1] = (slice(found[-1][0].start, stop), whole)
        elif needed:
            found.append((slice(start, stop), whole))
    return found or [(slice(0, 0), True)]


def _pairs(frame: Frame, keys: slice) -> Pairs:
    device = frame.key_positions.device
    return frame.at(
        torch.arange(frame.batch, device=device)[:, None, None, None],
        torch.arange(frame.heads, device=device)[:, None, None],
        torch.arange(frame.query_positions.shape[-1], device=device)[:, None],
        torch.arange(keys.start, keys.stop, device=device),
    )


def _scores(
    q: Tensor, k: Tensor, method: Scored, scale: float, frame: Frame, keys: slice
) -> Tensor:
    """Scores (B,H,N,w) of all queries with the keys of one span."""
    b, h, n, d = q.shape
    folded = (q * scale).reshape(b, k.shape[1], h // k.shape[1] * n, d)
    scores = (k[:, :, keys] @ folded.mT).mT.reshape(b, h, n, keys.stop - keys.start)
    bias = None if method.key_bias is None else method.key_bias[..., keys]
    if method.score is None and method.block_bias is None:
        return scores if bias is None else scores + bias[..., None, :]
    return modified_scores(scores, replace(method, key_bias=bias), _pairs(frame, keys), q)


def _visible(mask: Mask | None, frame: Frame, spans: list[Span]) -> Tensor | None:
    """(B or 1, H or 1, N, W), or None where every pair of the spans is visible."""
    if mask is None or all(full for _, full in spans):
        return None
    found = []
    for keys, _ in spans:
        seen = mask.visible(_pairs(frame, keys))
        found.append(seen[(None,) * (4 - seen.ndim)])
    n = frame.query_positions.shape[-1]
    heads = torch.broadcast_shapes(*(seen.shape[:2] for seen in found))
    wide = [
        seen.expand(*heads, n, keys.stop - keys.start)
        for seen, (keys, _) in zip(found, spans, strict=True)
    ]
    return torch.cat(wide, -1)


def _weights(
    scores: Tensor, visible: Tensor | None, method: Scored, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Weights (B,H,N,W), any for a row that sees nothing; softmax takes the place of the scores
    where nothing else may hold them.
    """
    own = method.score is None and method.block_bias is None and not scores.requires_grad
    if own and isinstance(method.normalise, Softmax) and scores.shape[-1]:
        return _softmax_in_place(scores, visible, need_lse)
    if visible is None:
        visible = scores.new_ones(1, 1, 1, scores.shape[-1], dtype=torch.bool)
    else:
        scores = scores.masked_fill(~visible, 0.0)  # padding may hold NaN
    return normalised(scores, visible, method.normalise, need_lse)


def _softmax_in_place(
    scores: Tensor, visible: Tensor | None, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """The log-sum-exp comes from the greatest weight, exp(greatest score - lse)."""
    empty = None if visible is None else ~visible.any(-1)
    if visible is not None:
        scores.masked_fill_(~visible, float("-inf"))
    greatest = scores.amax(-1) if need_lse else None
    weights = torch.softmax(scores, -1, out=scores)
    if greatest is None:
        return weights, None
    lse = greatest - weights.amax(-1).log()
    return weights, lse if empty is None else lse.masked_fill(empty, float("-inf"))


def _rows(spans: list[Span], padding: Tensor | None, device: torch.device) -> Tensor:
    """The key rows of the spans, (B or 1, 1, 1, W); a padded one is replaced by a real one, which
    its weight of zero cannot tell from it.
    """
    parts = [torch.arange(s.start, s.stop, dtype=torch.int32, device=device) for s, _ in spans]
    rows = torch.cat(parts) if len(parts) > 1 else parts[0]
    if padding is None or bool(padding.all()):
        return rows[None, None, None]
    first = padding.int().argmax(-1, keepdim=True).int()
    return torch.where(padding[:, rows], rows, first)[:, None, None]
