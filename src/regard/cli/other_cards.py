"""Cards beside mechanisms and treatments: probes, studies, lenses, searchers, recipes."""

from __future__ import annotations

from typing import Any

from regard.cli.output import tell
from regard.core.catalog import (
    lens_cards,
    probe_cards,
    recipe_cards,
    searcher_cards,
    study_cards,
)

MEASURED = ("metrics", "layers", "profiles")


def other_cards() -> dict[str, tuple[str, Any]]:
    """Every such card by name, with what it is."""
    tables = {
        "recipe": recipe_cards(),
        "lens": lens_cards(),
        "searcher": searcher_cards(),
        "study": study_cards(),
        "probe": probe_cards(),
    }
    return {name: (kind, card) for kind, table in tables.items() for name, card in table.items()}


def other_record(kind: str, card: Any) -> dict[str, Any]:
    """A card as plain data."""
    measured = {field: dict(getattr(card, field)) for field in MEASURED if hasattr(card, field)}
    return {
        "name": card.name,
        "kind": kind,
        "formula": card.doc,
        "papers": [{"title": p.title, "year": p.year, "url": p.url} for p in card.papers],
        **measured,
        "goldens": [golden.file for golden in card.goldens],
        "claim": {"text": card.claim.text, "command": card.claim.command},
    }


def tell_other(record: dict[str, Any]) -> None:
    """Print it."""
    tell(
        f"{record['name']}: {record['kind']}",
        record["formula"],
        [
            ("Papers", [f"{p['title']} ({p['year']}), {p['url']}" for p in record["papers"]]),
            *(
                (field.capitalize(), [f"{n}: {text}" for n, text in record[field].items()])
                for field in MEASURED
                if field in record
            ),
            ("Agrees with the authors' code", record["goldens"]),
            ("Claim", [record["claim"]["text"], f"$ {record['claim']['command']}"]),
        ],
    )
