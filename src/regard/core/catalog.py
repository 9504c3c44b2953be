"""Discovery: cards are found by walking the packages on demand, never by registration."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import TypeVar

from regard.core.card import Card, by_name
from regard.core.errors import UnknownNameError
from regard.core.lens import LensCard
from regard.core.probe import ProbeCard
from regard.core.recipe import RecipeCard
from regard.core.searcher import SearcherCard
from regard.core.study import StudyCard
from regard.core.treatment import TreatmentCard

PACKAGES = ("regard.operators", "regard.layers")
TREATMENTS = "regard.treatments"
PROBES = "regard.probes"
STUDIES = "regard.studies"
LENSES = "regard.lenses"
SEARCHERS = "regard.searchers"
RECIPES = "regard.recipes"
AnyCard = TypeVar(
    "AnyCard", Card, TreatmentCard, ProbeCard, StudyCard, LensCard, SearcherCard, RecipeCard
)


@cache
def cards() -> dict[str, Card]:
    """Every card of the installed package, by name, in alphabetical order."""
    return _walked(Card, *PACKAGES)


@cache
def treatments() -> dict[str, TreatmentCard]:
    """Every treatment of the installed package, by name, in alphabetical order."""
    return _walked(TreatmentCard, TREATMENTS)


@cache
def probe_cards() -> dict[str, ProbeCard]:
    """Every probe of the installed package, by name, in alphabetical order."""
    return _walked(ProbeCard, PROBES)


@cache
def study_cards() -> dict[str, StudyCard]:
    """Every study of the installed package, by name, in alphabetical order."""
    return _walked(StudyCard, STUDIES)


@cache
def lens_cards() -> dict[str, LensCard]:
    """Every lens with parameters of the installed package, by name, in alphabetical order."""
    return _walked(LensCard, LENSES)


@cache
def searcher_cards() -> dict[str, SearcherCard]:
    """Every searcher of the installed package, by name, in alphabetical order."""
    return _walked(SearcherCard, SEARCHERS)


@cache
def recipe_cards() -> dict[str, RecipeCard]:
    """Every recipe with a card of the installed package, by name, in alphabetical order."""
    return _walked(RecipeCard, RECIPES)


def card(name: str) -> Card:
    """The card of that name.

    Raises:
        UnknownNameError: no such card; near names are suggested.
    """
    return _named("mechanism", name, cards())


def treatment(name: str) -> TreatmentCard:
    """The treatment of that name.

    Raises:
        UnknownNameError: no such treatment; near names are suggested.
    """
    return _named("treatment", name, treatments())


def probe(name: str) -> ProbeCard:
    """The probe of that name.

    Raises:
        UnknownNameError: no such probe; near names are suggested.
    """
    return _named("probe", name, probe_cards())


def study(name: str) -> StudyCard:
    """The study of that name.

    Raises:
        UnknownNameError: no such study; near names are suggested.
    """
    return _named("study", name, study_cards())


def _named(what: str, name: str, table: dict[str, AnyCard]) -> AnyCard:
    if name not in table:
        raise UnknownNameError(what, name, list(table))
    return table[name]


def _walked(kind: type[AnyCard], *packages: str) -> dict[str, AnyCard]:
    """Every card of one kind in some packages, by name: those whose method lives in their file."""
    found = [
        c
        for package in packages
        for module in _modules(package)
        for c in vars(module).values()
        if isinstance(c, kind) and c.build.__module__ == module.__name__
    ]
    return dict(sorted(by_name(found).items()))


def _modules(package_name: str) -> Iterator[ModuleType]:
    """Every module of a package, sub-packages included."""
    package = importlib.import_module(package_name)
    for info in pkgutil.walk_packages(package.__path__, package_name + "."):
        if not info.ispkg:
            yield importlib.import_module(info.name)
