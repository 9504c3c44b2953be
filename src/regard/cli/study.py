"""`regard study`: findings of papers, made again at pocket size."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from regard.bench.record import Record
from regard.bench.spec import parse_options
from regard.cli.measuring import stoppable
from regard.cli.output import console, notice
from regard.core.errors import ArgumentError, UnknownNameError

if TYPE_CHECKING:
    from regard.core.study import StudyCard
    from regard.report.study import StudyRun

MISSED = 1  # what --check reports when a figure does not hold
Argument, Option = typer.Argument, typer.Option


class Study(Record):
    """List the studies, or run one: a paper's finding, made again at pocket size.

    Its figures are printed beside what the paper leads to expect. OUT/study.html shows them with
    their pictures, OUT/study.json holds them.

    Example: regard study bigram_backcopy --seed 1 --out runs/study
    """

    name: Annotated[str | None, Argument(help="a study; without one, all are listed")] = None
    seed: Annotated[int | None, Option(help="seed of everything that is drawn")] = None
    field: Annotated[
        list[str] | None, Option("--set", help="field of the study, name=value; repeatable")
    ] = None
    out: Annotated[Path | None, Option(help="folder for study.json and study.html")] = None
    check: Annotated[bool, Option("--check", help="exit with 1 if a figure does not hold")] = False
    threads: Annotated[int, Option(min=1, help="processor threads")] = 1
    no_progress: Annotated[bool, Option("--no-progress", help="draw no progress bar")] = False

    def run(self) -> None:
        """List, or run, print, write."""
        from regard.core.catalog import study, study_cards

        if self.name is None:
            console().print(_list(study_cards()))
            return
        run = self._ran(study(self.name))
        console().print(_figures(run))
        if self.out is not None:
            console().print(f"study: {_written(run, self.out)}")
        if self.check and not run.outcome.holds:
            notice("regard: not every figure holds")
            raise typer.Exit(MISSED)

    def _ran(self, card: StudyCard) -> StudyRun:
        import torch

        from regard.bench.machine import command, hardware, versions
        from regard.cli.progress import share_bar
        from regard.report.study import StudyRun

        known = _fields(card)
        options = parse_options(self.field or [], "set")
        if self.seed is not None:
            if "seed" in options:
                raise ArgumentError("seed", "once", "in --seed and in --set")
            options["seed"] = self.seed
        for name in options:
            if name not in known:
                raise UnknownNameError(f"field of {card.name}", name, list(known))
        experiment: Any = card.build(**_typed(options, known))
        torch.set_num_threads(self.threads)
        began = time.perf_counter()
        with stoppable("a study starts anew"), share_bar(not self.no_progress) as watch:
            outcome = experiment.run(lambda share: watch(share, card.name))
        return StudyRun(
            card,
            asdict(experiment),
            outcome,
            time.perf_counter() - began,
            command(sys.argv[1:]),
            versions().plain(),
            hardware().plain(),
        )


def _fields(card: StudyCard) -> dict[str, str]:
    """The fields of a study and their types as they are written."""
    return {field.name: str(field.type) for field in fields(card.build)}  # type: ignore[arg-type]


def _typed(options: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, Any]:
    """The options, refused where a number is wanted and something else was given.

    Raises:
        ArgumentError: another type; it is named.
    """
    found = dict(options)
    for name, value in options.items():
        kind = known[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        whole = number and float(value).is_integer()
        if kind == "int":
            if not whole:
                raise ArgumentError(name, "a whole number", repr(value))
            found[name] = int(value)
        elif kind == "float":
            if not number:
                raise ArgumentError(name, "a number", repr(value))
            found[name] = float(value)
        elif kind in ("bool", "str") and type(value).__name__ != kind:
            raise ArgumentError(name, kind, repr(value))
        elif kind.startswith("tuple") and not isinstance(value, tuple):
            raise ArgumentError(name, "a list such as (1, 2)", repr(value))
    return found


def _list(cards: Mapping[str, StudyCard]) -> Table:
    table = Table(caption=f"{len(cards)} studies; regard study NAME runs one")
    table.add_column("name", no_wrap=True)
    table.add_column("seconds", justify="right")
    for name in ("what", "paper"):
        table.add_column(name)
    for card in cards.values():
        papers = " ".join(f"{paper.arxiv} ({paper.year})" for paper in card.papers)
        table.add_row(card.name, str(card.seconds), card.summary, papers)
    return table


def _figures(run: StudyRun) -> Table:
    from regard.report.study import bounds_text
    from regard.report.units import duration, short

    table = Table(title=f"{run.card.name}, in {duration(run.seconds)}", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("figure", overflow="fold")
    for name in ("value", "bounds"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what the paper leads to expect", overflow="fold")
    for figure in run.outcome.figures:
        mark = "✓" if figure.holds else "✗"
        bounds = bounds_text(figure)
        table.add_row(mark, figure.name, short(figure.value), bounds, figure.expected)
    return table


def _written(run: StudyRun, folder: Path) -> Path:
    """Write study.json and study.html; the page."""
    from regard.report.study import write_study

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            "out", "a folder to write to", f"{folder} ({error.strerror})"
        ) from error
    part = folder / "study.json.part"
    text = json.dumps(run.plain(), indent=1, ensure_ascii=False, allow_nan=False)
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(folder / "study.json")
    write_study(run, folder / "study.html")
    return folder / "study.html"
