"""Eviction: after a call, each group of key heads asks its treatment which keys stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regard.core.cutting import held_of
from regard.core.incoming import Chosen, Incoming, Memory
from regard.core.kept import Bucket
from regard.core.moment import Held, Site
from regard.core.treatment import Treatment


def evict(call: Incoming, steps: Sequence[Chosen], memory: Memory) -> None:
    """Ask each key head's last `keep` step which keys stay, and drop the others."""
    if not steps:
        return
    buckets = _buckets(call, steps) if memory.buckets is None else memory.buckets
    changed = memory.buckets is not None
    for bucket in buckets:
        step = _keeper(bucket.heads, steps, call.site)
        if step is None:
            continue
        held = held_of(call, bucket)
        held.memory = memory.notes.setdefault(step.index, {})
        keep = step.treatment.keep(held)
        bucket.mark(held.marks)
        changed = changed or bool(held.marks)
        if keep is None or bool((keep | ~held.real).all()):
            continue
        changed = True
        if call.masked_only:
            bucket.views()[2].masked_fill_(~keep, -1)
        else:
            bucket.drop(keep, 0 if call.phase == "prefill" else call.q.shape[2])
    if changed:
        memory.buckets = buckets


def prompt_held(call: Incoming) -> Held:
    """All keys of a call by itself, as its treatment sees them after the prompt."""
    everyone = Chosen(0, Treatment(), tuple(range(call.site.heads)), frozenset({"prefill"}))
    return held_of(call, _buckets(call, [everyone])[0])


def _keeper(heads: Sequence[int], steps: Sequence[Chosen], site: Site) -> Chosen | None:
    """The last step that decides about these key heads; buckets never mix two."""
    first = heads[0] * site.group
    return next((s for s in reversed(steps) if first in s.heads), None)


def _buckets(call: Incoming, steps: Sequence[Chosen]) -> list[Bucket]:
    """Buckets of a dense cache: key heads that the same step decides about stand together."""
    site, batch, m = call.site, call.k.shape[0], call.k.shape[2]
    groups: dict[int, list[int]] = {}
    for head in range(site.kv_heads):
        keeper = _keeper((head,), steps, site)
        groups.setdefault(-1 if keeper is None else keeper.index, []).append(head)
    slots = torch.arange(call.total - m, call.total, dtype=torch.int32, device=call.k.device)
    slots = slots.expand(batch, m)
    if call.padding is not None:
        slots = slots.masked_fill(~call.padding[:, call.total - m :], -1)
    buckets = []
    for heads in groups.values():
        k, v = call.k, call.v
        if len(heads) < site.kv_heads:
            k, v = k[:, heads], v[:, heads]
        own = slots[:, None].expand(-1, len(heads), -1).clone()
        buckets.append(Bucket(tuple(heads), k, v, own, m))
    return buckets
