"""Cards of treatments: as plain data, as a table, and told in full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from rich.table import Table

from regard.cli.cards import golden_records, paper_records
from regard.cli.output import tell

if TYPE_CHECKING:
    from regard.core.treatment import TreatmentCard


def treatment_record(card: TreatmentCard) -> dict[str, Any]:
    """Everything a card says, JSON-ready."""
    return {
        "name": card.name,
        "kind": card.kind,
        "summary": card.summary,
        "formula": card.doc,
        "papers": paper_records(card.papers),
        "places": list(card.places),
        "options": dict(_options(card)),
        "evidence": card.evidence,
        "goldens": golden_records(card.goldens),
        "neutral": None if card.neutral is None else dict(card.neutral),
        "limits": [
            {"options": dict(x.options), "equals": x.other, "with": dict(x.other_options)}
            for x in card.limits
        ],
        "claim": {"text": card.claim.text, "command": card.claim.command},
        "deviations": list(card.deviations),
        "gaps": dict(card.gaps),
    }


def treatments_table(cards: Sequence[TreatmentCard]) -> Table:
    """One line per treatment."""
    caption = f"{len(cards)} treatments; regard plan treatments NAME tells more"
    table = Table(caption=caption)
    table.add_column("name", no_wrap=True)
    for name in ("places", "what it does", "evidence", "paper"):
        table.add_column(name)
    for card in cards:
        papers = " ".join(f"{paper.arxiv} ({paper.year})" for paper in card.papers)
        table.add_row(card.name, ", ".join(card.places), card.summary, card.evidence, papers)
    return table


def tell_treatment(card: TreatmentCard) -> None:
    """All about one treatment."""
    record = treatment_record(card)
    tell(f"{card.name}: treatment", record["formula"], _sections(record))


def _sections(record: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    yield "Papers", [f"{p['title']} ({p['year']}), {p['url']}" for p in record["papers"]]
    yield "Options", [_option(name, option) for name, option in record["options"].items()]
    yield "Places", [", ".join(record["places"])]
    yield "Evidence", [record["evidence"], *_evidence(record)]
    yield "Deviations from the paper", record["deviations"]
    yield "Gaps", [f"{check}: {reason}" for check, reason in record["gaps"].items()]
    yield "Claim", [record["claim"]["text"], f"$ {record['claim']['command']}"]


def _evidence(record: dict[str, Any]) -> Iterator[str]:
    for golden in record["goldens"]:
        yield f"agrees with {golden['source']} at {golden['commit']} ({golden['file']})"
    if record["neutral"] is not None:
        yield f"with {_arguments(record['neutral'])} changes no bit"
    for limit in record["limits"]:
        other = limit["equals"] or "the untouched model"
        more = f" with {_arguments(limit['with'])}" if limit["with"] else ""
        yield f"with {_arguments(limit['options'])} equals {other}{more}"


def _options(card: TreatmentCard) -> Iterator[tuple[str, dict[str, Any]]]:
    for field in fields(card.build):  # type: ignore[arg-type]
        found = {"type": str(field.type), "required": field.default is MISSING}
        yield field.name, found if found["required"] else {**found, "default": field.default}


def _option(name: str, option: dict[str, Any]) -> str:
    default = "" if option["required"] else f" = {option['default']!r}"
    return f"{name}: {option['type']}{default}"


def _arguments(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items()) or "the defaults"
