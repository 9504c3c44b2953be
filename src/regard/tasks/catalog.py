"""Discovery: tasks are found by walking this package on demand, never by registration."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

import regard.tasks
from regard.core.errors import UnknownNameError
from regard.tasks.task import Task


@cache
def tasks() -> dict[str, type[Any]]:
    """Every task class by name, in alphabetical order."""
    found: dict[str, Any] = {}
    for info in pkgutil.iter_modules(regard.tasks.__path__, "regard.tasks."):
        module: dict[str, Any] = vars(importlib.import_module(info.name))
        for value in module.values():
            if _is_task(value):
                found[value.name] = value
    return dict(sorted(found.items()))


def _is_task(value: Any) -> bool:
    return isinstance(value, type) and is_dataclass(value) and hasattr(value, "batches")


def task(name: str, **options: Any) -> Task:
    """The task of that name with these options.

    Raises:
        UnknownNameError: no such task, or an option it does not have; near names are suggested.
        ArgumentError: an option out of range.
    """
    known = tasks()
    if name not in known:
        raise UnknownNameError("task", name, list(known))
    valid = [field.name for field in fields(known[name])]
    for option in options:
        if option not in valid:
            raise UnknownNameError(f"option of {name}", option, valid)
    return known[name](**options)
