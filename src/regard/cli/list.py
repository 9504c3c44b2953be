"""`regard list`: which mechanisms there are."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.table import Table

from regard.cli.output import console
from regard.core.errors import UnknownNameError

if TYPE_CHECKING:
    from regard.core.card import Card

SHORT = {
    "noncausal self": "self",
    "causal self": "causal",
    "noncausal cross": "cross",
    "causal cross": "causal cross",
}


def list_cards(
    family: Annotated[str | None, typer.Option(help="only this family")] = None,
    pattern: Annotated[str | None, typer.Option(help='only with this, as in "causal self"')] = None,
    grid: Annotated[int | None, typer.Option(help="only for grids of 1, 2 or 3 axes")] = None,
    json_wanted: Annotated[bool, typer.Option("--json", help="print whole cards as JSON")] = False,
) -> None:
    """List the mechanisms, or whole cards as JSON; `regard plan treatments` lists treatments.

    Example: regard list --family recurrent --pattern "causal self"
    """
    from regard.cli.cards import card_record
    from regard.core.card import Family, Pattern
    from regard.core.catalog import cards

    _check("family", family, get_args(Family))
    _check("pattern", pattern, get_args(Pattern))
    _check("grid", grid, (1, 2, 3))
    found = [
        card
        for card in cards().values()
        if family in (None, card.family)
        and (pattern is None or pattern in card.patterns)
        and (grid is None or grid in card.grids)
    ]
    if json_wanted:
        typer.echo(json.dumps([card_record(card) for card in found], indent=1, ensure_ascii=False))
    else:
        console().print(_table(found))


def _check(what: str, value: str | int | None, known: tuple[str | int, ...]) -> None:
    if value is not None and value not in known:
        raise UnknownNameError(what, str(value), [str(name) for name in known])


def _table(found: list[Card]) -> Table:
    table = Table(caption=f"{len(found)} mechanisms; regard info NAME tells more")
    table.add_column("name", no_wrap=True)
    for name in ("family", "kind", "patterns", "grids", "time", "state", "evidence", "paper"):
        table.add_column(name)
    for card in sorted(found, key=lambda card: (card.family, card.name)):
        table.add_row(
            card.name,
            card.family,
            card.kind,
            ", ".join(SHORT[pattern] for pattern in card.patterns),
            ", ".join(f"{axes}-D" for axes in card.grids),
            f"N^{card.cost.time:g}",
            card.cost.state,
            card.evidence,
            " ".join(f"{paper.arxiv} ({paper.year})" for paper in card.papers),
        )
    return table
