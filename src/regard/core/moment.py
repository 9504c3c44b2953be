"""What a treatment is given: one attention call cut down to some heads, or the keys they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from regard.core.call import Call

Phase = Literal["prefill", "decode"]
"""The first call on an empty cache (or without one), and every later call."""


@dataclass(frozen=True)
class Site:
    """One attention module of a model.

    name: its path in the model. tower: the path with the layer number as `*`. layer, layers: index
    in its tower and their number. heads, kv_heads: query heads and key heads.
    """

    name: str
    tower: str
    layer: int
    layers: int
    heads: int
    kv_heads: int
    causal: bool = True
    cross: bool = False

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.heads // self.kv_heads


@dataclass(eq=False)
class Moment:
    """One attention call of one layer, cut down to the heads a treatment may touch.

    q (B,h,N,D), k (B,h_k,M,D), v (B,h_k,M,E). heads: which of the site's query heads these are.
    query_positions (B,N) and key_positions (B,h_k or 1,M) are numbers of real tokens before each;
    query_real (B,N) and real (B,h_k or 1,M) are False on padding and empty slots. visible: boolean
    (B,h or 1,N,M), what the model itself lets each query see; None = everything. length (B,): real
    tokens seen. memory: tensors with a leading batch axis, or records of such, that live as long as
    the cache (one dictionary per layer and step). shared: anything, passed from layer to layer
    within one forward (one dictionary per step). call: the same circumstances for a mechanism of
    the library; None once keys were evicted, since each head then holds its own. views: for a
    treatment that watches, the attention of heads that earlier steps changed.
    """

    site: Site
    phase: Phase
    heads: tuple[int, ...]
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    query_positions: Tensor
    key_positions: Tensor
    real: Tensor
    sight: Callable[[], Tensor | None]
    length: Tensor
    query_real: Tensor
    softcap: float | None = None
    bias: Tensor | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    call: Call | None = None
    step_heads: tuple[int, ...] = ()
    views: list[View] = field(default_factory=list)
    _shown: list[Tensor | None] = field(default_factory=list, init=False)

    @property
    def visible(self) -> Tensor | None:
        """Boolean (B,h or 1,N,M), what the model and earlier steps let each query see; None =
        everything. Made when first asked for.
        """
        if not self._shown:
            self._shown.append(self.sight())
        return self._shown[0]

    @visible.setter
    def visible(self, value: Tensor | None) -> None:
        self._shown[:] = [value]

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    def seen(self) -> Tensor:
        """What each query may see, as a boolean (B,h or 1,N,M)."""
        if self.visible is not None:
            return self.visible
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.q.device).expand(
            self.q.shape[0], 1, self.q.shape[2], self.k.shape[2]
        )


@dataclass(eq=False)
class View:
    """The attention of some heads as the steps of a plan left it: `at`, with their bias and what
    they let it see; weights (B,h,N,M) where a step rewrote them; neither where a step computes
    these heads another way.
    """

    heads: tuple[int, ...]
    at: Moment | None = None
    weights: Tensor | None = None


@dataclass(eq=False)
class Held:
    """The keys one group of key heads holds after a call, for a decision on which stay.

    q (B,h,N,D): this call's queries of these heads. k (B,g,M,D), v (B,g,M,E). positions (B,g,M):
    numbers of real tokens before each key; real (B,g,M): False on empty slots. query_positions
    (B,N) and query_real (B,N). length (B,): real tokens seen so far. marks: numbers per key,
    (B,g,M), that follow their key through evictions, by name; a new key starts at zero.
    visible, memory: as in Moment.
    """

    site: Site
    phase: Phase
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    positions: Tensor
    real: Tensor
    query_positions: Tensor
    query_real: Tensor
    length: Tensor
    sees: Callable[[Tensor | slice], Tensor | None]
    marks: dict[str, Tensor]
    softcap: float | None = None
    bias: Tensor | None = None
    memory: dict[str, Any] = field(default_factory=dict)
