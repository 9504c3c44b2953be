"""One attention call as a host hands it over, the steps that act on it, and what is remembered
between calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.errors import ArgumentError
from regard.core.kept import Bucket
from regard.core.mask import Causal
from regard.core.moment import Phase, Site, View
from regard.core.scored import attend
from regard.core.state import each_tensor
from regard.core.treatment import Place, Treatment, places_of
from regard.core.weights import Scored


@dataclass(frozen=True)
class Chosen:
    """A step of a plan on one layer: its number, the treatment, the heads and phases it acts in."""

    index: int
    treatment: Treatment
    heads: tuple[int, ...]
    phases: frozenset[Phase]

    def touches(self, *places: Place) -> bool:
        """Whether it overrides one of these places."""
        return any(place in places_of(type(self.treatment)) for place in places)


@dataclass(eq=False)
class Memory:
    """What one layer remembers between calls: the buckets after an eviction (None: nothing was
    evicted), and one dictionary per step, of tensors with a leading batch axis or records of such.
    """

    buckets: list[Bucket] | None = None
    notes: dict[int, dict[str, Any]] = field(default_factory=dict)

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch axis to everything."""
        for bucket in self.buckets or ():
            bucket.each(change)
        for notes in self.notes.values():
            notes.update({name: each_tensor(x, change) for name, x in notes.items()})


@dataclass(eq=False)
class Incoming:
    """One attention call as a host sees it.

    q (B,H,N,D), k (B,H_k,M,D), v (B,H_k,M,E): all keys, or, once keys were evicted, the new ones.
    visible: boolean (B or 1, H or 1, N, ·) over the model's own key slots from `first_slot` on;
    None: everything (`causal`: everything up to the query). padding (B,T): True = real token, over
    all slots up to now; None: all. query_slot: slot of the first query. original: the model's own
    kernel on (q, k, v), giving (B,H,N,E). bias: the model's own additive term (B or 1,H,N,·).
    pattern: whether `visible`, padding aside, is causal, full, or known by its pairs alone.
    masked_only: hide evicted keys instead of dropping them, to compare. cached: whether there is a
    cache to evict from. views: where a step watches, what the others did to which heads.
    """

    site: Site
    phase: Phase
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    original: Callable[[Tensor, Tensor, Tensor], Tensor]
    visible: Tensor | None = None
    causal: bool = False
    padding: Tensor | None = None
    query_slot: int = 0
    first_slot: int = 0
    softcap: float | None = None
    bias: Tensor | None = None
    pattern: Literal["causal", "full", "given"] = "given"
    shared: dict[int, dict[str, Any]] = field(default_factory=dict)
    masked_only: bool = False
    cached: bool = True
    views: list[View] | None = None

    @property
    def total(self) -> int:
        """Slots up to the last key."""
        if self.site.cross:
            return self.k.shape[2]
        return self.query_slot + self.q.shape[2]

    def positions(self) -> Tensor:
        """Number of real tokens before each slot, (B or 1, T)."""
        if self.padding is None:
            return torch.arange(self.total, device=self.q.device)[None]
        return (self.padding.cumsum(-1) - 1).clamp_min(0)


def split_mask(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A model's mask (B or 1, H or 1, N, M) as visibility and, where it is more than a mask, a
    finite bias: a number near the lowest there is hides a key.

    Raises:
        ArgumentError: neither boolean nor floating-point.
    """
    if mask is None or mask.dtype == torch.bool:
        return mask, None
    if not mask.is_floating_point():
        raise ArgumentError("attention_mask", "a boolean or floating-point mask", mask.dtype)
    visible = mask > torch.finfo(mask.dtype).min / 2
    rest = mask.masked_fill(~visible, 0.0)
    return visible, rest if bool(rest.any()) else None


def bare(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Incoming:
    """A call by itself, as of one layer reading a prompt: q (B,H,N,D), k (B,H_k,M,D), v
    (B,H_k,M,E). The last query sees the last key.
    """
    site = Site("attention", "attention", 0, 1, q.shape[1], k.shape[1], causal=causal)
    scale = q.shape[-1] ** -0.5

    def original(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call = Call(mask=Causal() if causal else None, scale=scale)
        return attend(q, k, v, call, Scored(), impl="dense").output

    return Incoming(
        site,
        "prefill",
        q,
        k,
        v,
        scale,
        original,
        causal=causal and q.shape[2] > 1,
        query_slot=k.shape[2] - q.shape[2],
        pattern="causal" if causal else "full",
    )
