"""Kept keys: what is left of one layer's cache after eviction, with as many keys per group of heads
as each group needs.

Heads that hold equally many keys share a bucket; a bucket is one rectangle, so a plan that treats
heads differently really saves their bytes. A kept key remembers its slot, the index of its token in
the sequence as the model counts it (padding included), so that positions and masks stay exact
whatever was dropped. Evicted keys leave holes, which the next tokens fill.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

SLACK = 128
"""A bucket grows by one part in this many of its keys (at least 4 keys)."""


@dataclass(eq=False)
class Bucket:
    """Keys k (B,G,C,D) and values v (B,G,C,E) of some key heads, of which `filled` columns are
    written.

    slots (B,G,C): each key's token, -1 where there is none. free: holes that every row has at
    least. marks: further numbers per key (B,G,C).
    """

    heads: tuple[int, ...]
    k: Tensor
    v: Tensor
    slots: Tensor
    filled: int
    free: int = 0
    marks: dict[str, Tensor] = field(default_factory=dict)

    def views(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is written of k, v and slots."""
        return tuple(x.narrow(2, 0, self.filled) for x in (self.k, self.v, self.slots))  # type: ignore[return-value]

    def marked(self) -> dict[str, Tensor]:
        """What is written of the marks."""
        return {name: x.narrow(2, 0, self.filled) for name, x in self.marks.items()}

    def mark(self, marks: dict[str, Tensor]) -> None:
        """Replace the marks by others (B,G,filled), with as much room behind as the keys have."""
        room = self.k.shape[2] - self.filled
        self.marks = {name: F.pad(x, (0, room)) if room else x for name, x in marks.items()}

    def append(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Add keys k (B,G,n,D), v (B,G,n,E) with slots (B,n), -1 for padding."""
        n = k.shape[2]
        slots = slots[:, None].expand(-1, len(self.heads), -1).to(self.slots.dtype)
        if self.free >= n:
            holes = (self.slots.narrow(2, 0, self.filled) < 0).to(torch.uint8)
            at = holes.topk(n, dim=-1).indices
            self.free -= n
            self._write(lambda x, new: x.scatter_(2, _like(at, new), new), k, v, slots)
            return
        if self.filled + n > self.k.shape[2]:
            self._grow(self.filled + n)
        start, self.filled = self.filled, self.filled + n
        self._write(lambda x, new: x.narrow(2, start, n).copy_(new), k, v, slots)

    def _write(
        self, put: Callable[[Tensor, Tensor], Tensor], k: Tensor, v: Tensor, slots: Tensor
    ) -> None:
        put(self.k, k)
        put(self.v, v)
        put(self.slots, slots)
        for mark in self.marks.values():
            put(mark, mark.new_zeros(slots.shape))

    def _grow(self, least: int) -> None:
        capacity = least + max(4, least // SLACK)

        def larger(x: Tensor) -> Tensor:
            new = x.new_empty(*x.shape[:2], capacity, *x.shape[3:])
            new.narrow(2, 0, self.filled).copy_(x.narrow(2, 0, self.filled))
            return new

        self.k, self.v, self.slots = larger(self.k), larger(self.v), larger(self.slots)
        self.marks = {name: larger(x) for name, x in self.marks.items()}

    def drop(self, keep: Tensor, spare: int = 0) -> None:
        """Keep only keys where (B,G,filled) is True. Up to `spare` freed columns stay as holes for
        the next tokens; beyond that the bucket shrinks.
        """
        slots = self.slots.narrow(2, 0, self.filled)
        slots.masked_fill_(~keep, -1)
        counts = (slots >= 0).sum(-1)
        most = int(counts.max()) if counts.numel() else 0
        if self.filled - most <= spare:
            self.free = self.filled - most
            return
        order = (slots >= 0).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        order = order[..., :most]
        k, v, _ = self.views()
        self.k, self.v = k.gather(2, _like(order, k)), v.gather(2, _like(order, v))
        self.slots = slots.gather(2, order)
        self.marks = {name: x.gather(2, order) for name, x in self.marked().items()}
        self.filled, self.free = most, 0

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by change(tensor): for batch reordering."""
        self.k, self.v, self.slots = change(self.k), change(self.v), change(self.slots)
        self.marks = {name: change(x) for name, x in self.marks.items()}

    @property
    def bytes(self) -> int:
        """Bytes of all its buffers, slack included."""
        tensors = [self.k, self.v, self.slots, *self.marks.values()]
        return sum(x.numel() * x.element_size() for x in tensors)


def _like(index: Tensor, x: Tensor) -> Tensor:
    """Index (B,G,n) for gathering along axis 2 of x (B,G,·[,D])."""
    return index if x.ndim == 3 else index[..., None].expand(*index.shape, x.shape[-1])
