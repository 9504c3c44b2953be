"""Cards as plain data, for `regard list --json` and `regard info --json`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from regard.core.card import Card, Golden, Paper


def card_record(card: Card) -> dict[str, Any]:
    """Everything a card says, JSON-ready; option defaults that JSON cannot hold are their repr."""
    return {
        "name": card.name,
        "kind": card.kind,
        "family": card.family,
        "summary": card.summary,
        "formula": card.doc,
        "papers": paper_records(card.papers),
        "patterns": list(card.patterns),
        "grids": list(card.grids),
        "cost": {"time": card.cost.time, "state": card.cost.state},
        "options": {name: option_record(p) for name, p in card.options.items()},
        "evidence": card.evidence,
        "goldens": golden_records(card.goldens),
        "limits": [
            {
                "options": _plain(limit.options),
                "equals": limit.other,
                "with": _plain({**limit.other_options, **limit.other_call}),
            }
            for limit in card.limits
        ],
        "forms": None if card.forms is None else {card.forms[0]: list(card.forms[1])},
        "claim": {"text": card.claim.text, "command": card.claim.command},
        "deviations": list(card.deviations),
        "gaps": dict(card.gaps),
    }


def paper_records(papers: Iterable[Paper]) -> list[dict[str, Any]]:
    """Papers, JSON-ready."""
    return [{"title": p.title, "arxiv": p.arxiv, "year": p.year, "url": p.url} for p in papers]


def golden_records(goldens: Iterable[Golden]) -> list[dict[str, Any]]:
    """Goldens, JSON-ready."""
    return [{"file": g.file, "source": g.source, "commit": g.commit} for g in goldens]


def option_record(parameter: inspect.Parameter) -> dict[str, Any]:
    """Type and default of an option; without a default it must be given."""
    kind = parameter.annotation
    text = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    if parameter.default is inspect.Parameter.empty:
        return {"type": text, "required": True}
    return {"type": text, "required": False, "default": _plain(parameter.default)}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    return repr(value)
