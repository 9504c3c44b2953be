"""Which mechanism stands in a layer: a name, or a name with options. A hybrid is a list of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from regard.build import create
from regard.core.card import Card, Pattern
from regard.core.catalog import card
from regard.core.errors import UnsupportedError

Spec = str | tuple[str, Mapping[str, Any]]


def card_of(spec: Spec) -> Card:
    """The card a spec names."""
    return card(spec if isinstance(spec, str) else spec[0])


def mechanism(spec: Spec, dim: int, heads: int, pattern: Pattern, dims: int = 1) -> nn.Module:
    """The layer a spec describes, for use in one pattern on a grid of `dims` axes.

    Raises:
        UnknownNameError: no such mechanism or option.
        UnsupportedError: the mechanism has not got the pattern, or not that kind of grid.
    """
    entry = card_of(spec)
    if pattern not in entry.patterns:
        raise UnsupportedError(entry.name, f"{pattern} is not among {', '.join(entry.patterns)}")
    if dims not in entry.grids:
        raise UnsupportedError(entry.name, f"a grid of {dims} axes; it knows {entry.grids}")
    options = {} if isinstance(spec, str) else spec[1]
    return create(entry.name, dim=dim, heads=heads, **options)
