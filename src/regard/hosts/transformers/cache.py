"""Cache layers for transformers: a dense layer until something is evicted, then kept keys.

A kept layer reports tokens *seen* for positions and masks, whatever it holds; masks are cut down to
the kept keys by the runner. One layer wraps the library's own, which serves unchanged as long as
nothing is evicted, so that a plan that evicts nothing changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from regard.core.errors import UnsupportedError
from regard.core.incoming import Memory


class KeptLayer(CacheLayerMixin):
    """One layer of a cache under a plan. inner: the library's own dense layer. owner: the run."""

    is_compileable = False
    is_croppable = False

    def __init__(self, inner: Any, owner: object) -> None:
        self.inner = inner
        self.memory = Memory()
        super().__init__()
        self.owner = owner
        self.seen = 0
        self.fresh = False
        self.quantised = hasattr(inner, "_quantized_keys")
        self.dense_bytes = 0
        self.arrived: tuple[Tensor, Tensor] | None = None
        self.window: int | None = getattr(inner, "sliding_window", None)
        self.is_sliding = bool(getattr(inner, "is_sliding", False))

    @property
    def keys(self) -> Tensor | None:
        """The keys held, (B,H_k,M,D), for readers of the library's own layers; where heads hold
        unequal numbers there is no such rectangle and M is 0 (see `held`).
        """
        return self._rectangle(0)

    @keys.setter
    def keys(  # pyright: ignore[reportIncompatibleVariableOverride] (a view of what is held)
        self, value: Tensor | None
    ) -> None: ...

    @property
    def values(self) -> Tensor | None:
        """As keys."""
        return self._rectangle(1)

    @values.setter
    def values(  # pyright: ignore[reportIncompatibleVariableOverride] (as keys)
        self, value: Tensor | None
    ) -> None: ...

    def _rectangle(self, which: int) -> Tensor | None:
        if self.memory.buckets is None:
            return (self.inner.keys, self.inner.values)[which]
        first = self.memory.buckets[0].views()[which]
        if len(self.memory.buckets) == 1:
            return first
        heads = sum(len(b.heads) for b in self.memory.buckets)
        return first.new_empty(first.shape[0], heads, 0, first.shape[-1])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All keys and values while dense. After an eviction, tensors that merely have the shape of
        all (models derive lengths from it) and take no room; the runner puts `arrived` where it
        belongs.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.fresh:
            raise UnsupportedError("plan", "this layer's attention does not pass through regard")
        self.seen += key_states.shape[2]
        if self.quantised:
            self.dense_bytes += sum(
                x.numel() * x.element_size() for x in (key_states, value_states)
            )
        self.fresh = True
        if self.memory.buckets is not None:
            self.arrived = (key_states, value_states)
            return self._shaped(key_states), self._shaped(value_states)
        return self.inner.update(key_states, value_states, *args, **kwargs)

    def _shaped(self, x: Tensor) -> Tensor:
        return x[:, :, :1].expand(-1, -1, self.seen, -1)

    def evicted(self) -> None:
        """Let go of the dense copy: the memory's buckets hold what is left, some in its tensors."""
        self.inner.keys = self.inner.values = None
        self.inner.is_initialized = False

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        query_length = _length(query_length)
        if self.window is None or not self.is_sliding:
            return self.seen + query_length, 0
        first = max(self.seen - self.window + 1, 0)
        return self.seen - first + query_length, first

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # as transformers called it before 5.10

    def reset(self) -> None:
        self.inner.reset()
        self.memory = Memory()
        self.seen, self.fresh = 0, False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UnsupportedError("plan", "a cache that evicts cannot take tokens back")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices])

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.memory.each(change)
        if self.memory.buckets is None and self.inner.get_seq_length() > 0:
            self.inner.keys, self.inner.values = change(self.inner.keys), change(self.inner.values)

    @property
    def held(self) -> list[tuple[tuple[int, ...], int, int]]:
        """What is held, bucket by bucket: key heads, keys per head (of the longest row), bytes."""
        if self.memory.buckets is not None:
            return [
                (b.heads, int((b.views()[2] >= 0).sum(-1).amax()) if b.filled else 0, b.bytes)
                for b in self.memory.buckets
            ]
        size = sum(x.numel() * x.element_size() for x in _tensors(vars(self.inner)))
        if not size:
            return []
        keys = self.inner.keys
        whole = isinstance(keys, torch.Tensor) and not self.quantised
        heads = tuple(range(keys.shape[1])) if whole else ()
        return [(heads, keys.shape[2] if whole else self.seen, size)]


def _length(query: Any) -> int:
    """A number of queries, which older versions of transformers pass as their positions."""
    return len(query) if isinstance(query, Tensor) and query.ndim else int(query)


def _tensors(x: Any) -> Iterator[Tensor]:
    """Every tensor in nested records of a layer that has one dimension or more."""
    if isinstance(x, Tensor):
        if x.ndim:
            yield x
    elif isinstance(x, Mapping):
        for part in x.values():
            yield from _tensors(part)
    elif isinstance(x, (list, tuple)):
        for part in x:
            yield from _tensors(part)


class AbsentLayer(CacheLayerMixin):
    """The cache of a layer that a plan leaves out: empty, it counts as its neighbour `like`."""

    is_croppable = False
    is_sliding = False

    def __init__(self, like: Any, owner: object) -> None:
        super().__init__()
        self.like = like
        self.owner = owner
        self.is_sliding = bool(getattr(like, "is_sliding", False))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise UnsupportedError("plan", "a layer that was left out received keys")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        raise UnsupportedError("plan", "a layer that was left out received keys")

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.like.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self.like.get_seq_length()

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # as transformers called it before 5.10

    def reset(self) -> None: ...

    def reorder_cache(self, beam_idx: Tensor) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...

    def batch_select_indices(self, indices: Tensor) -> None: ...
