"""`regard info`: everything one mechanism says about itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from regard.cli.output import tell


def info(
    name: Annotated[
        str, typer.Argument(help="a name from `regard list`, or from the tables in docs")
    ],
    json_wanted: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False,
) -> None:
    """Tell all about one mechanism; or about a treatment, probe, study, lens, searcher or recipe.

    Formula, papers, options, cost, evidence, deviations and claim. Of things with one name the
    first in this order is told.

    Example: regard info sliding_window
    """
    from regard.cli.cards import card_record
    from regard.cli.other_cards import other_cards, other_record, tell_other
    from regard.cli.treatments import tell_treatment, treatment_record
    from regard.core.catalog import card, cards, treatments

    if name not in {**cards(), **treatments()} and name in other_cards():
        other = other_record(*other_cards()[name])
        if json_wanted:
            typer.echo(json.dumps(other, indent=1, ensure_ascii=False))
        else:
            tell_other(other)
        return
    treated = treatments().get(name) if name not in cards() else None
    record = card_record(card(name)) if treated is None else treatment_record(treated)
    if json_wanted:
        typer.echo(json.dumps(record, indent=1, ensure_ascii=False))
    elif treated is not None:
        tell_treatment(treated)
    else:
        tell(f"{name}: {record['family']} {record['kind']}", record["formula"], _sections(record))


def _sections(record: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    cost = record["cost"]
    yield "Papers", [f"{p['title']} ({p['year']}), {p['url']}" for p in record["papers"]]
    yield "Options", [_option(name, option) for name, option in record["options"].items()]
    yield "Patterns", record["patterns"]
    yield "Grids", [", ".join(f"{axes}-D" for axes in record["grids"])]
    yield "Cost", [f"time N^{cost['time']:g}; decode state: {cost['state']}"]
    yield "Evidence", [record["evidence"], *_evidence(record)]
    yield "Deviations from the paper", record["deviations"]
    yield "Gaps", [f"{check}: {reason}" for check, reason in record["gaps"].items()]
    yield "Claim", [record["claim"]["text"], f"$ {record['claim']['command']}"]


def _option(name: str, option: dict[str, Any]) -> str:
    default = "" if option["required"] else f" = {option['default']!r}"
    return f"{name}: {option['type']}{default}"


def _evidence(record: dict[str, Any]) -> Iterator[str]:
    for golden in record["goldens"]:
        yield f"agrees with {golden['source']} at {golden['commit']} ({golden['file']})"
    for limit in record["limits"]:
        yield f"with {_arguments(limit['options'])} equals {limit['equals']}" + (
            f" with {_arguments(limit['with'])}" if limit["with"] else ""
        )
    for option, values in (record["forms"] or {}).items():
        yield f"{option} = {', '.join(values)} agree"


def _arguments(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items()) or "the defaults"
