"""regard: attention mechanisms behind one call, and what every head does with them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ArgumentError": "regard.core.errors",
    "Atlas": "regard.atlases.record",
    "Call": "regard.core.call",
    "Causal": "regard.core.mask",
    "Document": "regard.masks.document",
    "Passage": "regard.core.passage",
    "Plan": "regard.plan",
    "Result": "regard.core.call",
    "Sinks": "regard.masks.sinks",
    "UnknownNameError": "regard.core.errors",
    "UnsupportedError": "regard.core.errors",
    "Window": "regard.masks.window",
    "atlas": "regard.atlases.survey",
    "card": "regard.core.catalog",
    "cards": "regard.core.catalog",
    "create": "regard.build",
    "explain": "regard.core.scored",
    "search": "regard.searchers.verb",
    "merge": "regard.core.merge",
    "treatment": "regard.core.catalog",
    "treatment_cards": "regard.core.catalog:treatments",
}

if TYPE_CHECKING:
    from regard import pocket as pocket
    from regard.atlases.record import Atlas as Atlas
    from regard.atlases.survey import atlas as atlas
    from regard.build import create as create
    from regard.core.call import Call as Call
    from regard.core.call import Result as Result
    from regard.core.catalog import card as card
    from regard.core.catalog import cards as cards
    from regard.core.catalog import treatment as treatment
    from regard.core.catalog import treatments as treatment_cards  # noqa: F401 (another name)
    from regard.core.errors import ArgumentError as ArgumentError
    from regard.core.errors import UnknownNameError as UnknownNameError
    from regard.core.errors import UnsupportedError as UnsupportedError
    from regard.core.mask import Causal as Causal
    from regard.core.merge import merge as merge
    from regard.core.passage import Passage as Passage
    from regard.core.scored import explain as explain
    from regard.masks.document import Document as Document
    from regard.masks.sinks import Sinks as Sinks
    from regard.masks.window import Window as Window
    from regard.plan import Plan as Plan
    from regard.searchers.verb import search as search


_ROOMS = ("pocket",)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"regard.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'regard' has no attribute {name!r}")
    home, _, renamed = _HOMES[name].partition(":")
    return getattr(importlib.import_module(home), renamed or name)


def __dir__() -> list[str]:
    return sorted([*_HOMES, *_ROOMS, "__version__"])
