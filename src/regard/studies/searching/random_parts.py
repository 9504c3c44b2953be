"""Random parts of a model to keep, as many as a search kept, to set beside its choice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from regard.core.linears import blocks_of
from regard.searchers.slimming import Indices, Kept, slim


def random_models(model: Any, like: Kept, count: int, seed: int) -> Iterator[Any]:
    """`count` models of the shape that `like` gives, made of parts drawn evenly."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield slim(model, _drawn(model, like, random))


def _drawn(model: Any, like: Kept, random: torch.Generator) -> Kept:
    """As many heads and units of each layer, layers and channels as `like` has; heads in as many
    groups with common keys.
    """
    blocks, heads, units = blocks_of(model), [], []
    for one, some, own in zip(blocks, like.heads, like.units, strict=True):
        size = one.site.group
        groups = len({head // size for head in some})
        members = len(some) // groups
        chosen = _some(one.site.kv_heads, groups, random)
        heads.append(tuple(g * size + i for g in chosen for i in _some(size, members, random)))
        units.append(_some(one.width, len(own), random))
    layers = None if like.layers is None else _some(len(blocks), len(like.layers), random)
    width = model.config.hidden_size
    channels = None if like.channels is None else _some(width, len(like.channels), random)
    return Kept(tuple(heads), tuple(units), layers, channels)


def _some(size: int, count: int, random: torch.Generator) -> Indices:
    """`count` of so many numbers, in order."""
    return tuple(sorted(torch.randperm(size, generator=random)[:count].tolist()))
