"""Cutting a call down to what a treatment is given: some heads, their keys, what they may see."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.incoming import Chosen, Incoming, Memory
from regard.core.kept import Bucket
from regard.core.mask import Causal, Given, Mask
from regard.core.moment import Held, Moment, Site


def key_heads(heads: Sequence[int], site: Site) -> tuple[int, ...] | None:
    """The key heads of these query heads, or None unless they make up whole groups."""
    keys = sorted({h // site.group for h in heads})
    whole = [k * site.group + i for k in keys for i in range(site.group)]
    return tuple(keys) if whole == list(heads) else None


def parts_of(
    heads: tuple[int, ...], site: Site, buckets: Sequence[Bucket] | None
) -> list[tuple[tuple[int, ...], Bucket | None]]:
    """Query heads by the bucket their keys stand in."""
    if buckets is None:
        return [(heads, None)]
    parts = []
    for bucket in buckets:
        mine = tuple(h for h in heads if h // site.group in bucket.heads)
        if mine:
            parts.append((mine, bucket))
    return parts


def moment_of(
    call: Incoming,
    heads: tuple[int, ...],
    bucket: Bucket | None,
    memory: Memory,
    step: Chosen | None,
) -> Moment:
    """The call as these heads see it; their keys stand in `bucket`, or in the dense cache."""
    site, positions = call.site, call.positions()
    batch, n = call.q.shape[0], call.q.shape[2]
    positions = positions.expand(batch, -1)
    queries = positions[:, -1:].expand(-1, n) if site.cross else positions[:, call.total - n :]
    q = call.q if len(heads) == site.heads else call.q[:, list(heads)]
    if bucket is None:
        k, v, slots = _dense_keys(call, heads)
        slots = slots.expand(batch, 1, -1)
    else:
        k, v, slots = bucket.views()
        if key_heads(heads, site) != bucket.heads:
            rows = [bucket.heads.index(h // site.group) for h in heads]
            k, v, slots = k[:, rows], v[:, rows], slots[:, rows]
    real = slots >= 0
    if call.padding is not None and bucket is None:
        real = call.padding[:, None].gather(2, slots)
    index = slots.clamp_min(0).long()
    key_positions = positions[:, None].expand(-1, slots.shape[1], -1).gather(2, index)
    at = Moment(
        site,
        call.phase,
        heads,
        q,
        k,
        v,
        call.scale,
        queries,
        key_positions,
        real,
        partial(_visible, call, heads, slots, bucket, slice(None)),
        positions[:, -1] + 1 if call.padding is None else call.padding.sum(-1),
        _query_real(call),
        call.softcap,
        _slotted(call.bias, heads, slots, call.first_slot, q.shape[1]),
        call=_call(call, real, queries, key_positions, bucket),
    )
    if step is not None:
        hand_over(at, step, call, memory)
    return at


def hand_over(at: Moment, step: Chosen, call: Incoming, memory: Memory) -> None:
    """Give a moment what belongs to one step: its memory, what its layers share, its heads."""
    at.memory = memory.notes.setdefault(step.index, {})
    at.shared = call.shared.setdefault(step.index, {})
    at.step_heads = step.heads


def held_of(call: Incoming, bucket: Bucket) -> Held:
    """What a treatment decides on: the keys of one bucket, after this call."""
    site, n = call.site, call.q.shape[2]
    heads = tuple(h * site.group + i for h in bucket.heads for i in range(site.group))
    k, v, slots = bucket.views()
    positions = call.positions().expand(len(slots), -1)
    index = slots.clamp_min(0).long()
    padding = call.padding
    return Held(
        site,
        call.phase,
        call.q if len(heads) == site.heads else call.q[:, list(heads)],
        k,
        v,
        call.scale,
        positions[:, None].expand(-1, slots.shape[1], -1).gather(2, index),
        slots >= 0,
        positions[:, call.total - n :],
        _query_real(call),
        positions[:, -1] + 1 if padding is None else padding.sum(-1),
        partial(_visible, call, heads, slots, bucket),
        bucket.marked(),
        call.softcap,
        _slotted(call.bias, heads, slots, call.first_slot, len(heads)),
    )


def _query_real(call: Incoming) -> Tensor:
    """Which queries are real tokens, (B,N)."""
    batch, _, n, _ = call.q.shape
    if call.padding is None or call.site.cross:
        return torch.ones(batch, n, dtype=torch.bool, device=call.q.device)
    return call.padding[:, call.total - n :]


def _dense_keys(call: Incoming, heads: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    m = call.k.shape[2]
    slots = torch.arange(call.total - m, call.total, device=call.q.device)[None, None]
    if len(heads) == call.site.heads:
        return call.k, call.v, slots
    whole = key_heads(heads, call.site)
    rows = [h // call.site.group for h in heads] if whole is None else list(whole)
    return call.k[:, rows], call.v[:, rows], slots


def picked_heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Some heads of a tensor (·, H or 1, …)."""
    return x if x.shape[1] == 1 else x[:, list(heads)]


def _slotted(
    x: Tensor | None, heads: Sequence[int], slots: Tensor, first: int, count: int
) -> Tensor | None:
    """Columns of x (B or 1, H or 1, N, ·), which start at slot `first`, at slots (B,g,M) of key
    heads, for `count` query heads.
    """
    if x is None:
        return None
    x = picked_heads(x, heads)
    if slots.shape[1] == 1 and x.shape[-1] == slots.shape[-1]:
        return x  # the dense cache: its slots are the columns
    index = (slots - first).clamp_min(0).long().repeat_interleave(count // slots.shape[1], dim=1)
    x = x.expand(len(slots), count, -1, -1)
    return x.gather(3, index[:, :, None].expand(-1, -1, x.shape[2], -1))


def _visible(
    call: Incoming,
    heads: Sequence[int],
    slots: Tensor,
    bucket: Bucket | None,
    rows: Tensor | slice,
) -> Tensor | None:
    """What the model lets some queries of these heads, a slice of rows or indices (B,w), see of
    these slots (B,g,M); None: everything.
    """
    n, count = call.q.shape[2], len(heads)
    hidden = bucket is not None and bool((slots < 0).any())
    given = None if call.visible is None else picked(call.visible, rows, len(slots))
    shown = _slotted(given, heads, slots, call.first_slot, count)
    if shown is None and not hidden and (n == 1 or not call.causal):
        return None
    if shown is None and call.causal:
        queries = torch.arange(call.query_slot, call.query_slot + n, device=slots.device)
        queries = queries[None, None, :, None]
        shown = slots[:, :, None] <= picked(queries, rows, len(slots))
    if hidden:
        there = (slots >= 0)[:, :, None]
        if shown is None:
            return there.repeat_interleave(count // there.shape[1], dim=1)
        there = there if shown.shape[1] == slots.shape[1] else _repeated(there, count)
        shown = shown & there
    return shown if shown is None or shown.shape[1] in (1, count) else _repeated(shown, count)


def _repeated(x: Tensor, count: int) -> Tensor:
    """Rows of key heads, once for each of their `count` query heads."""
    return x.repeat_interleave(count // x.shape[1], dim=1)


def picked(x: Tensor, rows: Tensor | slice, batch: int) -> Tensor:
    """Rows of x (B or 1, H or 1, N, ·): a slice of them, or those at indices (B,w)."""
    if isinstance(rows, slice):
        return x[:, :, rows]
    x = x.expand(batch, -1, -1, -1)
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))


def _call(
    call: Incoming, real: Tensor, queries: Tensor, keys: Tensor, bucket: Bucket | None
) -> Call | None:
    """The same circumstances for a mechanism of the library; None where each head holds its own
    keys, which no mechanism knows.
    """
    if bucket is not None:
        return None
    mask: Mask | None = None
    if call.pattern == "causal":
        mask = Causal()
    elif call.pattern == "given" and call.visible is not None:
        mask = given_mask(call.visible)
    return Call(
        mask=mask,
        padding=None if call.padding is None else real[:, 0],
        query_positions=queries,
        key_positions=keys[:, 0],
        scale=call.scale,
        layer=call.site.layer,
        layers=call.site.layers,
        step=None if call.phase == "prefill" else call.query_slot,
    )


def given_mask(visible: Tensor) -> Mask:
    """A boolean (B or 1, H or 1, N, M) over rows as a mask."""

    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        rows = b if visible.shape[0] > 1 else b * 0
        heads = h if visible.shape[1] > 1 else h * 0
        return visible[rows, heads, q, k]

    return Given(mod)
