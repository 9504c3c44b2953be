"""The runner: one attention call of one layer under the steps of a plan.

It cuts the call down to the heads a step may touch, so treatments never choose heads. Heads that no
step changes go through the model's own kernel, bit for bit; the others through a fused kernel, or
through the explicit matrix where a step rewrites weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.call import Call
from regard.core.cutting import given_mask, hand_over, key_heads, moment_of, parts_of
from regard.core.errors import UnsupportedError
from regard.core.evicting import evict
from regard.core.incoming import Chosen, Incoming, Memory
from regard.core.kept import Bucket
from regard.core.model_scores import finished
from regard.core.moment import Held, Moment, View
from regard.core.narrowing import narrowed
from regard.core.scored import attend
from regard.core.treatment import Place
from regard.core.weights import Scored, Softmax, group_scores, group_values

CHANGING: tuple[Place, ...] = ("bias", "visible", "weights", "attention")
"""Places that change the attention itself."""


def treat(call: Incoming, steps: Sequence[Chosen], memory: Memory) -> Tensor:
    """Output (B,H,N,E) of one call under its steps; then evictions, recorded in memory."""
    active = [s for s in steps if call.phase in s.phases]
    _extend(call, memory)
    call.views = [] if any(s.treatment.watches for s in active) else None
    for step in active:
        if step.touches("inputs"):
            _change_inputs(call, step, memory)
    out = _attended(call, [s for s in active if s.touches(*CHANGING)], memory)
    if any(s.touches("output") for s in active):
        out = out.clone()  # the kernel's backward may read its own output
    for step in active:
        if step.touches("output"):
            for heads, bucket in parts_of(step.heads, call.site, memory.buckets):
                at = moment_of(call, heads, bucket, memory, step)
                at.views = call.views or []
                out[:, list(heads)] = step.treatment.output(out[:, list(heads)], at)
    if call.cached:
        evict(call, [s for s in active if s.touches("keep")], memory)
    return out


def _extend(call: Incoming, memory: Memory) -> None:
    """Append the call's new keys to the buckets, if there are any."""
    if memory.buckets is None:
        return
    n = call.k.shape[2]
    slots = torch.arange(call.total - n, call.total, device=call.q.device).expand(len(call.q), -1)
    if call.padding is not None:
        slots = slots.masked_fill(~call.padding[:, call.total - n : call.total], -1)
    for bucket in memory.buckets:
        chosen = list(bucket.heads)
        bucket.append(call.k[:, chosen], call.v[:, chosen], slots)


def _change_inputs(call: Incoming, step: Chosen, memory: Memory) -> None:
    who = type(step.treatment).__name__
    queries = call.q.clone()
    for heads, bucket in parts_of(step.heads, call.site, memory.buckets):
        at = moment_of(call, heads, bucket, memory, step)
        q, k, v = step.treatment.inputs(at)
        queries[:, list(heads)] = q
        if k is at.k and v is at.v:
            continue
        if bucket is not None:
            raise UnsupportedError(who, "its keys were evicted; put it on other heads")
        whole = key_heads(heads, call.site)
        if whole is None:
            raise UnsupportedError(who, "it changes keys that other query heads share")
        call.k, call.v = call.k.clone(), call.v.clone()
        call.k[:, list(whole)], call.v[:, list(whole)] = k, v
    call.q = queries


def _attended(call: Incoming, steps: Sequence[Chosen], memory: Memory) -> Tensor:
    heads = range(call.site.heads)
    groups: dict[tuple[int, ...], list[int]] = {}
    for head in heads:
        own = tuple(i for i, s in enumerate(steps) if head in s.heads)
        groups.setdefault(own, []).append(head)
    found: list[tuple[tuple[int, ...], Tensor | None]] = []
    for own, members in groups.items():
        for part, bucket in parts_of(tuple(members), call.site, memory.buckets):
            mine = [steps[i] for i in own]
            changed = None
            if mine or bucket is not None:
                changed = _changed(call, part, bucket, mine, memory)
            found.append((part, changed))
    if all(changed is None for _, changed in found):
        return call.original(call.q, call.k, call.v)
    if len(found) == 1 and found[0][1] is not None and len(found[0][0]) == len(heads):
        return found[0][1]
    if any(changed is None for _, changed in found):
        out = call.original(call.q, call.k, call.v).clone()
    else:
        out = call.q.new_empty(*call.q.shape[:3], call.v.shape[-1])
    for part, changed in found:
        if changed is not None:
            out[:, list(part)] = changed
    return out


def _changed(
    call: Incoming,
    heads: tuple[int, ...],
    bucket: Bucket | None,
    steps: Sequence[Chosen],
    memory: Memory,
) -> Tensor | None:
    """Output of some heads under the steps that change attention; None: the model's own."""
    at = moment_of(call, heads, bucket, memory, None)
    whole, touched = at.call, bucket is not None
    rewriting: list[Chosen] = []
    for step in steps:
        hand_over(at, step, call, memory)
        given = step.treatment.attention(at)
        if given is not None:
            _check_last(step, steps)
            _show(call, View(heads))
            return given
        bias, visible = step.treatment.bias(at), step.treatment.visible(at)
        if bias is not None:
            at.bias = bias if at.bias is None else at.bias + bias
        if visible is not None:
            at.visible = at.seen() & visible
            at.call = None  # which does not know of this
        touched = touched or bias is not None or visible is not None
        if step.touches("weights"):
            rewriting.append(step)
    if rewriting:
        weights = weights_of(at)
        for step in rewriting:
            hand_over(at, step, call, memory)
            weights = step.treatment.weights(weights, at)
        _show(call, View(heads, at, weights))
        return group_values(weights.to(at.v.dtype), at.v)
    if call.views is not None and whole is not None and at.call is None:
        at.call = whole.but(mask=given_mask(at.seen()))
    _show(call, View(heads, at))
    return _fused(narrowed(at)) if touched else None


def _show(call: Incoming, view: View) -> None:
    """Let a step that watches see what became of some heads."""
    if call.views is not None:
        call.views.append(view)


def _check_last(step: Chosen, steps: Sequence[Chosen]) -> None:
    """Raise UnsupportedError if later steps would be lost on an attention computed another way."""
    if step is not steps[-1]:
        later = type(steps[-1].treatment).__name__
        raise UnsupportedError(
            later, f"{type(step.treatment).__name__} computes these heads another way before it"
        )


def scores_of(at: Moment | Held) -> Tensor:
    """Scores (B,h,N,M) of a moment: scaled, soft-capped, biased; not masked."""
    return finished(group_scores(at.q, at.k) * at.scale, at.softcap, at.bias)


def weights_of(at: Moment) -> Tensor:
    """The model's own weights (B,h,N,M) at a moment."""
    seen = at.seen()
    return Softmax()(scores_of(at), seen, seen.sum(-1, keepdim=True))


def _fused(at: Moment) -> Tensor:
    """Plain attention of a moment, through a fused kernel where there is one."""
    if at.softcap is not None:
        return group_values(weights_of(at), at.v)
    if at.visible is None and at.bias is None:
        return attend(at.q, at.k, at.v, Call(scale=at.scale), Scored()).output
    mask = at.visible
    if at.bias is not None:
        mask = at.bias.to(at.q.dtype).expand(-1, -1, at.q.shape[2], at.k.shape[2])
        mask = mask if at.visible is None else mask.masked_fill(~at.visible, float("-inf"))
    grouped = at.q.shape[1] != at.k.shape[1]
    return F.scaled_dot_product_attention(
        at.q, at.k, at.v, attn_mask=mask, scale=at.scale, enable_gqa=grouped
    )
