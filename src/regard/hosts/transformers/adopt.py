"""Letting a model call `regard` instead of its attention implementation, and giving that back."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from regard.core.errors import UnsupportedError
from regard.hosts.transformers.run import BEFORE, attention, make_mask
from regard.hosts.transformers.sites import is_model

NAME = "regard"
DENSE_MASKS = ("eager", "sdpa")
"""Implementations whose masks are dense tensors, on which a plan can stand."""
_ADOPTED: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def adopt(model: Any) -> None:
    """Let the model call `regard`, remembering what each of its configurations had."""
    with _LOCK:
        entry = _ADOPTED.get(model)
        if entry is not None:
            entry[0] += 1
            return
        configs = {id(m.config): m.config for m in model.modules() if is_model(m)}
        before = {key: config._attn_implementation for key, config in configs.items()}
        for name in set(before.values()):
            if name not in DENSE_MASKS:
                raise UnsupportedError(
                    f"attention implementation {name!r}",
                    f"a plan needs dense masks; load the model with one of {DENSE_MASKS}",
                )
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, make_mask)
        original = _implementations(model.config)
        BEFORE.update(before)
        _ADOPTED[model] = [1, original, tuple(configs)]
        model.set_attn_implementation(NAME)


def release(model: Any) -> None:
    """Undo adopt when the last plan leaves."""
    with _LOCK:
        entry = _ADOPTED.get(model)
        if entry is None:
            return
        entry[0] -= 1
        if entry[0]:
            return
        model.set_attn_implementation(entry[1])
        for key in entry[2]:
            BEFORE.pop(key, None)
        del _ADOPTED[model]


def _implementations(config: Any) -> Any:
    """The attention implementations of a configuration and its sub-configurations, in the form
    set_attn_implementation takes.
    """
    inner = {
        key: _implementations(getattr(config, key))
        for key in config.sub_configs
        if getattr(config, key) is not None
    }
    return {"": config._attn_implementation, **inner} if inner else config._attn_implementation
