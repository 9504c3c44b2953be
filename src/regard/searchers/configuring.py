"""Configurations of transformers for models of other sizes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from regard.core.errors import UnsupportedError

UNITS = "units"
"""In changes: the field, whatever its name, that holds the units of a feed-forward part."""
UNIT_FIELDS = ("intermediate_size", "ffn_dim", "n_inner")


def configured(
    model: Any, changes: Mapping[str, Any], layers: Sequence[int], into: type | None = None
) -> Any:
    """A model's configuration with other numbers, for those of its layers that stay: what it lists
    by layer, it lists for these. head_dim stays what it is. into: the class of a model it is meant
    for.

    Raises:
        UnsupportedError: the configuration has no such field, or refuses the numbers.
    """
    config = model.config
    depth = config.num_hidden_layers
    fields = copy.deepcopy(config.to_dict())
    fields.pop("model_type", None)
    fields.pop("architectures", None)
    for name, value in changes.items():
        fields[_field(config, name)] = value
    if {"num_attention_heads", "hidden_size"} & set(changes):
        heads = config.num_attention_heads
        fields["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // heads
    for name, value in fields.items():
        if "layer" in name and isinstance(value, list) and len(value) == depth:
            fields[name] = [value[layer] for layer in layers]
    kind: Any = type(config) if into is None else into.config_class  # type: ignore[attr-defined]
    if kind is not type(config) and "sliding_window" not in fields:
        fields["sliding_window"] = None  # else a class that has one would take its default
    try:
        made = kind(**fields)
    except _refusals() as error:
        said = str(error).strip().splitlines()[-1].strip()
        raise UnsupportedError("slimming", f"{kind.__name__} refuses: {said}") from error
    made._attn_implementation = config._attn_implementation
    return made


def admits(model: Any, changes: Mapping[str, Any], into: type | None = None) -> bool:
    """Whether the configuration takes these numbers."""
    try:
        configured(model, changes, range(model.config.num_hidden_layers), into)
    except UnsupportedError:
        return False
    return True


def _field(config: Any, name: str) -> str:
    if name == UNITS:
        name = next((field for field in UNIT_FIELDS if hasattr(config, field)), UNITS)
    name = config.attribute_map.get(name, name)
    if name != "num_key_value_heads" and not hasattr(config, name):
        raise UnsupportedError("slimming", f"{type(config).__name__} has no field {name}")
    return name


@cache
def _refusals() -> tuple[type[Exception], ...]:
    """What configurations raise when they refuse their fields."""
    try:
        from huggingface_hub.errors import StrictDataclassError
    except ImportError:
        return (ValueError,)
    return (ValueError, StrictDataclassError)
