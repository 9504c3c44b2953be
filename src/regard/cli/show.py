"""`regard show`: a picture of how a mechanism mixes tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regard.bench.spec import parse_options
from regard.core.errors import ArgumentError


def show(
    name: Annotated[str, typer.Argument(help="a name from `regard list`")],
    out: Annotated[Path | None, typer.Option(help="file to draw into [NAME.png]")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="option of the mechanism, name=value; repeatable")
    ] = None,
    length: Annotated[int | None, typer.Option(help="tokens of a sequence")] = None,
    grid: Annotated[str | None, typer.Option(help="or sides of a token grid, as in 6x6")] = None,
) -> None:
    """Draw how a mechanism mixes tokens.

    Who may attend to whom, where that is fixed, and how much each token is measured to read from
    each other one.

    Example: regard show sliding_window --option window=4 --length 24 --out window.png
    """
    from regard.core.catalog import card
    from regard.report.pattern import draw_pattern, measure_pattern

    entry = card(name)
    options = parse_options(option or [], "option")
    path = Path(f"{name}.png") if out is None else out
    draw_pattern(measure_pattern(entry, options, _sides(length, grid)), path)
    typer.echo(str(path))


def _sides(length: int | None, grid: str | None) -> tuple[int, ...] | None:
    if length is not None and grid is not None:
        raise ArgumentError("length, grid", "at most one of the two", "both")
    if length is not None:
        return (length,)
    if grid is None:
        return None
    try:
        return tuple(int(side) for side in grid.split("x"))
    except ValueError as error:
        raise ArgumentError("grid", "sides such as 6x6", repr(grid)) from error
