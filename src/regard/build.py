"""`create`: any mechanism as a layer (B,N,C) -> (B,N,C), by name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from regard.core.card import Card
from regard.core.catalog import card
from regard.core.errors import UnknownNameError
from regard.layers.attention import Attention

_SHELL = ("kv_heads", "head_dim", "rope", "qk_norm", "bias", "out_bias")


def create(name: str, *, dim: int, heads: int, **options: Any) -> nn.Module:
    """A layer for mechanism `name`, called as `layer(x)` or `layer(x, call)` with x (B, N, dim).

    An operator is put into the standard attention layer, whose own options (kv_heads, head_dim,
    rope, qk_norm, bias, out_bias) mix with the operator's.

    Raises:
        UnknownNameError: no such mechanism, or an option it does not have; near or valid names are
            listed.
    """
    entry = card(name)
    valid = layer_options(entry)
    for option in options:
        if option not in valid:
            raise UnknownNameError(f"option of {name}", option, valid)
    if entry.kind == "layer":
        return entry.build(dim=dim, heads=heads, **options)
    shell = {key: options.pop(key) for key in _SHELL if key in options}
    return Attention(dim, heads, name, options, **shell)


def layer_options(entry: Card) -> list[str]:
    """Every keyword `create` takes for this card."""
    own = list(entry.options)
    if entry.kind == "layer":
        return own
    parameters = inspect.signature(Attention).parameters
    return own + [key for key in _SHELL if key in parameters]
