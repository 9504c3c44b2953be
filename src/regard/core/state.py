"""Decode state: what a causal mechanism carries from token to token, as records of tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.frame import Frame
from regard.core.mask import Mask


@dataclass(frozen=True, eq=False)
class Keys:
    """Cached keys k (B,H_k,M,D), values v (B,H_v,M,E), absolute positions (B,M) and which rows are
    real tokens (B,M).
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    real: Tensor


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
    """The cache with new keys behind the old ones."""
    if cache is None:
        return Keys(k, v, positions, real)
    return Keys(
        torch.cat([cache.k, k], 2),
        torch.cat([cache.v, v], 2),
        torch.cat([cache.positions, positions], 1),
        torch.cat([cache.real, real], 1),
    )


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


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in a (nested) state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if is_dataclass(state):
        return sum(state_bytes(getattr(state, f.name)) for f in fields(state))
    if isinstance(state, (list, tuple)):
        return sum(state_bytes(part) for part in state)
    return 0
