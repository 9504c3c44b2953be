"""Attention modules of a transformers model: those whose forward asks the attention interface."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from regard.core.hosting import mentions, tower_of
from regard.core.moment import Site

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
CROSS = re.compile(r"(encoder_attn|cross_?attn|cross_?attention|EncDecAttention)", re.IGNORECASE)
LOOKS = re.compile(r"attention|attn", re.IGNORECASE)


def is_model(model: object) -> bool:
    """Whether it is a PreTrainedModel, told without importing transformers."""
    return any(
        c.__module__ == "transformers.modeling_utils" and c.__name__ == "PreTrainedModel"
        for c in type(model).__mro__
    )


def sites_of(model: Any) -> list[Site]:
    """Every attention module that goes through the interface, in the model's order."""
    found = [(name, m) for name, m in model.named_modules() if _asks(m) and _heads(m) is not None]
    towers: dict[str, int] = {}
    for name, _ in found:
        tower = tower_of(name)
        towers[tower] = towers.get(tower, 0) + 1
    counts: dict[str, int] = {}
    sites = []
    for name, module in found:
        tower = tower_of(name)
        layer = counts.get(tower, 0)
        counts[tower] = layer + 1
        heads = _heads(module) or 1
        cross = bool(CROSS.search(name)) or bool(getattr(module, "is_cross_attention", False))
        sites.append(
            Site(
                name,
                tower,
                layer,
                towers[tower],
                heads,
                _key_heads(module, heads),
                bool(getattr(module, "is_causal", False)) and not cross,
                cross,
            )
        )
    return sites


def unreached_by(model: Any) -> Mapping[str, str]:
    """Modules that look like attention, hold parameters and are no part of one that is reached."""
    reached = {site.name for site in sites_of(model)}
    missing = {}
    for name, module in model.named_modules():
        own = type(module).__name__
        if not LOOKS.search(own) or any(LOOKS.search(type(c).__name__) for c in module.children()):
            continue
        inside = any(name == r or name.startswith(r + ".") or r.startswith(name) for r in reached)
        if not inside and any(True for _ in module.parameters()):
            missing[name] = f"{own} does not call transformers' attention interface"
    return missing


def _asks(module: nn.Module) -> bool:
    """Whether this module's own forward looks up the attention interface."""
    return mentions(type(module).forward, INTERFACE)


def _heads(module: nn.Module) -> int | None:
    config = getattr(module, "config", None)
    for holder in (module, config):
        for name in ("num_heads", "num_attention_heads", "n_heads", "n_head"):
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    return None


def _key_heads(module: nn.Module, heads: int) -> int:
    value = getattr(module, "num_key_value_heads", None)
    if isinstance(value, int) and heads % value == 0:
        return value
    groups = getattr(module, "num_key_value_groups", None)
    return heads // groups if isinstance(groups, int) and heads % groups == 0 else heads
