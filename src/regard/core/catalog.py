"""Discovery: cards are found by walking the packages on demand, never by registration."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from regard.core.card import Card, by_name
from regard.core.errors import UnknownNameError

PACKAGES = ("regard.operators", "regard.layers")


@cache
def cards() -> dict[str, Card]:
    """Every card of the installed package, by name, in alphabetical order."""
    found: list[Card] = []
    for package_name in PACKAGES:
        package = importlib.import_module(package_name)
        for info in pkgutil.walk_packages(package.__path__, package_name + "."):
            if not info.ispkg:
                found += cards_of(importlib.import_module(info.name))
    return dict(sorted(by_name(found).items()))


def cards_of(module: object) -> list[Card]:
    """Cards defined in one module: values of type Card whose method lives there."""
    name = getattr(module, "__name__", "")
    return [c for c in vars(module).values() if isinstance(c, Card) and c.build.__module__ == name]


def card(name: str) -> Card:
    """The card of that name.

    Raises:
        UnknownNameError: no such card; near names are suggested.
    """
    table = cards()
    if name not in table:
        raise UnknownNameError("mechanism", name, list(table))
    return table[name]
