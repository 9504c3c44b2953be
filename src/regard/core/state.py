"""Decode state: what a causal mechanism carries from token to token, as records of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.frame import Frame
from regard.core.mask import Mask


class Room:
    """Space behind cached rows: buffers along one axis each, of which the first `filled` rows are
    taken. Rows once written are never overwritten, so every state that shares the room keeps its
    own; only the state that ends where the room is filled may write on.
    """

    def __init__(self, rows: tuple[Tensor, ...], capacity: int) -> None:
        self.filled = 0
        self.buffers = tuple(x.new_empty(_resized(x, capacity)) for x in rows)
        self.append(rows)

    def append(self, rows: tuple[Tensor, ...]) -> None:
        """Write rows behind the last ones."""
        more = rows[0].shape[_axis(rows[0])]
        for buffer, x in zip(self.buffers, rows, strict=True):
            buffer.narrow(_axis(x), self.filled, more).copy_(x)
        self.filled += more

    def fits(self, more: int) -> bool:
        """Whether that many rows still fit."""
        first = self.buffers[0]
        return self.filled + more <= first.shape[_axis(first)]

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """Views of what is filled."""
        return tuple(x.narrow(_axis(x), 0, self.filled) for x in self.buffers)


def _axis(x: Tensor) -> int:
    """The axis of cached rows: (B,H,M,D) or (B,M)."""
    return 2 if x.ndim == 4 else 1


def _resized(x: Tensor, rows: int) -> list[int]:
    return [rows if axis == _axis(x) else side for axis, side in enumerate(x.shape)]


@dataclass(frozen=True, eq=False)
class Keys:
    """Cached keys k (B,H_k,M,D), values v (B,H_v,M,E), absolute positions (B,M) and which rows are
    real tokens (B,M). room: where they stand, if there is space for more behind them.
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    real: Tensor
    room: Room | None = None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The four tensors."""
        return self.k, self.v, self.positions, self.real


@dataclass(frozen=True, eq=False)
class Decoding:
    """State of a layer: tokens seen so far per sequence (B,), and what its operator carries (Keys
    or its own record).
    """

    seen: Tensor
    inner: Any = None


def arrivals(x: Tensor, call: Call, seen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Positions (B,T) of new tokens, which of them are real (B,T), and the count seen afterwards
    (B,).
    """
    batch, new = x.shape[0], x.shape[1]
    real = (
        call.padding
        if call.padding is not None
        else torch.ones(batch, new, dtype=torch.bool, device=x.device)
    )
    seen = torch.zeros(batch, dtype=torch.long, device=x.device) if seen is None else seen
    positions = (seen[:, None] + real.cumsum(-1) - 1).clamp_min(0)
    return positions, real, seen + real.sum(-1)


def extended(cache: Keys | None, k: Tensor, v: Tensor, positions: Tensor, real: Tensor) -> Keys:
    """The cache with new keys behind the old ones.

    Without gradients it grows in place where it can, so that a token costs no copy of the cache;
    the old state stays as it was, and two continuations of one state do not disturb each other.
    """
    new = (k, v, positions, real)
    if cache is None:
        return Keys(*new)
    if torch.compiler.is_compiling() or any(x.requires_grad for x in (*new, *cache.parts)):
        pairs = zip(cache.parts, new, strict=True)
        k, v, positions, real = (torch.cat([old, x], _axis(x)) for old, x in pairs)
        return Keys(k, v, positions, real)
    room, length = cache.room, cache.k.shape[2]
    if room is None or room.filled != length or not room.fits(k.shape[2]):
        room = Room(cache.parts, 2 * (length + k.shape[2]))
    room.append(new)
    k, v, positions, real = room.rows
    return Keys(k, v, positions, real, room)


def trimmed(cache: Keys, mask: Mask | None, seen: Tensor, heads: int, call: Call) -> Keys:
    """The cache without keys that no query from position `seen` on can see, in any head or
    sequence.
    """
    if mask is None:
        return cache
    frame = Frame(cache.k.shape[0], heads, seen[:, None], cache.positions, call.grid, call.prefix)
    pairs = frame.all()
    alive = mask.alive(pairs)[(None,) * (4 - mask.alive(pairs).ndim)]
    keep = (
        (alive.expand(-1, -1, -1, cache.k.shape[2]) & cache.real[:, None, None])
        .any(0)
        .any(0)
        .any(0)
    )
    if bool(keep.all()):
        return cache
    return Keys(
        cache.k[:, :, keep], cache.v[:, :, keep], cache.positions[:, keep], cache.real[:, keep]
    )


def each_tensor(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A (nested) state with every tensor changed; each has a leading batch axis."""
    if isinstance(state, Tensor):
        return change(state)
    if is_dataclass(state) and not isinstance(state, type):
        parts = {f.name: each_tensor(getattr(state, f.name), change) for f in fields(state)}
        return replace(state, **parts)
    if isinstance(state, (list, tuple)):
        return type(state)(each_tensor(part, change) for part in state)
    return state


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in a (nested) state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if is_dataclass(state):
        return sum(state_bytes(getattr(state, f.name)) for f in fields(state))
    if isinstance(state, (list, tuple)):
        return sum(state_bytes(part) for part in state)
    return 0
