r"""The attention call: what a mechanism may know besides q, k and v, and what it may return besides
o.

    q (B,H,N,D)  k (B,H_k,M,D)  v (B,H_v,M,E)   ->   o (B,H,N,E)

H is a multiple of H_k and of H_v: query head h reads key head h // (H/H_k) and value head h //
(H/H_v).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.core.frame import Frame
from regard.core.mask import Mask, Real, both


@dataclass(frozen=True, eq=False)
class Call:
    """The circumstances of one attention call. Everything is optional; a mechanism honours a field
    or refuses it.

    Attributes:
        mask: visibility, a predicate of the mask algebra; None = every key is visible to every
            query.
        padding: boolean (B, M), True = real key. The content of padded tokens never matters.
        query_padding: boolean (B, N), True = real query; padded queries give zeros.
        query_positions: integers (N,) or (B, N); default: those of the last N real keys.
        key_positions: integers (M,) or (B, M); default: the number of real keys before each.
        grid: shape of the token grid, (length,), (h, w) or (t, h, w), row-major, after `prefix`
            tokens.
        prefix: number of tokens (CLS, registers, text) before the grid.
        scale: factor on q·k; default 1/sqrt(D), or what the method says.
        layer, layers: index of this layer and their number.
        roles: boolean (B, M) tensors that name kinds of keys ("landmark", "image", "sink", ...).
        step: decoding step, None outside decoding.
        embeddings: (B, N, C) token embeddings of the input, for layers that read them again.
        notes: a dictionary that mechanisms fill with named by-products (auxiliary losses, gates).
    """

    mask: Mask | None = None
    padding: Tensor | None = None
    query_padding: Tensor | None = None
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None
    grid: tuple[int, ...] | None = None
    prefix: int = 0
    scale: float | None = None
    layer: int = 0
    layers: int = 1
    roles: Mapping[str, Tensor] = field(default_factory=dict)
    step: int | None = None
    embeddings: Tensor | None = None
    notes: dict[str, list[Any]] | None = None

    def but(self, **changes: Any) -> Call:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def of_self(self) -> Call:
        """The same call for self-attention: padded keys are padded queries too."""
        return self if self.query_padding is not None else self.but(query_padding=self.padding)

    def note(self, name: str, value: Any) -> None:
        """Leave a by-product for whoever asked (passed a `notes` dictionary)."""
        if self.notes is not None:
            self.notes.setdefault(name, []).append(value)

    def positions(self, n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Absolute positions of queries (B or 1, N) and keys (B or 1, M).

        Unless given, a key's position is the number of real keys before it (on a grid: its cell),
        so left and right padding mean the same, and the last N keys are the queries' own: causal
        attention is aligned bottom-right.
        """
        if self.key_positions is not None:
            keys = _as_rows(self.key_positions, "key_positions", m)
        elif self.padding is not None and self.grid is None:
            keys = (self.padding.cumsum(-1) - 1).clamp_min(0)
        else:
            keys = torch.arange(m, device=device)[None]
        if self.query_positions is not None:
            return _as_rows(self.query_positions, "query_positions", n), keys
        if n == m or (n < m and self.padding is None):
            return keys[:, m - n :], keys
        last = keys.amax(-1, keepdim=True) if m else torch.full((1, 1), -1, device=device)
        return last + torch.arange(1 - n, 1, device=device), keys

    def frame(self, q: Tensor, k: Tensor) -> Frame:
        """Coordinates of this call for q (B,H,N,D) and k (B,H_k,M,D)."""
        queries, keys = self.positions(q.shape[2], k.shape[2], q.device)
        return Frame(q.shape[0], q.shape[1], queries, keys, self.grid, self.prefix)

    def visibility(self, own: Mask | None = None) -> Mask | None:
        """The call's mask, its padding and the mechanism's own mask in one."""
        real = None if self.padding is None else Real(self.padding)
        return both(both(self.mask, own), real)


def _as_rows(positions: Tensor, name: str, length: int) -> Tensor:
    if positions.ndim not in (1, 2) or positions.shape[-1] != length:
        raise ArgumentError(f"call.{name}", f"({length},) or (B, {length})", tuple(positions.shape))
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise ArgumentError(f"call.{name}", "an integer tensor", positions.dtype)
    return positions if positions.ndim == 2 else positions[None]


@dataclass(frozen=True, eq=False)
class Result:
    """What a mechanism returns: output (B,H,N,E), where known the row log-sum-exp (B,H,N), and the
    decode state.
    """

    output: Tensor
    lse: Tensor | None = None
    state: Any = None

    @property
    def row_lse(self) -> Tensor:
        """The log-sum-exp (B,H,N), which must have been asked for.

        Raises:
            ArgumentError: it was not.
        """
        if self.lse is None:
            raise ArgumentError("lse", "a log-sum-exp (ask for it with need_lse=True)", None)
        return self.lse
