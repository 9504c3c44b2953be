"""Discovery: cards are found by walking the packages on demand, never by registration."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache
from types import ModuleType

from regard.core.card import Card, by_name
from regard.core.errors import UnknownNameError
from regard.core.probe import ProbeCard
from regard.core.treatment import TreatmentCard

PACKAGES = ("regard.operators", "regard.layers")
TREATMENTS = "regard.treatments"
PROBES = "regard.probes"


@cache
def cards() -> dict[str, Card]:
    """Every card of the installed package, by name, in alphabetical order."""
    found = [c for name in PACKAGES for module in _modules(name) for c in cards_of(module)]
    return dict(sorted(by_name(found).items()))


@cache
def treatments() -> dict[str, TreatmentCard]:
    """Every treatment of the installed package, by name, in alphabetical order."""
    found = [
        c
        for module in _modules(TREATMENTS)
        for c in vars(module).values()
        if isinstance(c, TreatmentCard) and c.build.__module__ == module.__name__
    ]
    return dict(sorted(by_name(found).items()))


@cache
def probe_cards() -> dict[str, ProbeCard]:
    """Every probe of the installed package, by name, in alphabetical order."""
    found = [
        c
        for module in _modules(PROBES)
        for c in vars(module).values()
        if isinstance(c, ProbeCard) and c.build.__module__ == module.__name__
    ]
    return dict(sorted(by_name(found).items()))


def treatment(name: str) -> TreatmentCard:
    """The treatment of that name.

    Raises:
        UnknownNameError: no such treatment; near names are suggested.
    """
    table = treatments()
    if name not in table:
        raise UnknownNameError("treatment", name, list(table))
    return table[name]


def _modules(package_name: str) -> Iterator[ModuleType]:
    """Every module of a package, sub-packages included."""
    package = importlib.import_module(package_name)
    for info in pkgutil.walk_packages(package.__path__, package_name + "."):
        if not info.ispkg:
            yield importlib.import_module(info.name)


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
