"""`regard compare`: train mechanisms side by side, and report."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.table import Table

from regard.bench.demo import MECHANISMS
from regard.bench.record import Record, arguments_checked, write_json
from regard.bench.spec import Spec, parse_options, parse_spec, parse_specs
from regard.bench.study import Study
from regard.bench.trial import CONV, STEPS, Budget, Network
from regard.cli.launching import Launch, Workers, launched
from regard.cli.measuring import stoppable
from regard.cli.output import console, notice
from regard.cli.progress import progress_bar, share_bar
from regard.core.errors import ArgumentError
from regard.report.units import amount, byte_size, percent

if TYPE_CHECKING:
    from regard.bench.comparison import Comparison, Row

N = TypeVar("N", int, float)
NETWORK, BUDGET = Network(), Budget()
Option = typer.Option


class Compare(Record):
    """Train mechanisms on a task and compare them.

    Every trial is kept as it finishes: the same command resumes. OUT/report.html shows the result,
    OUT/comparison.json holds it.

    Example: regard compare --task "recall(pairs=8,length=64)" --seeds 0,1
    """

    task: Annotated[str, Option(help="task, its options in parentheses")] = "recall"
    task_option: Annotated[
        list[str] | None, Option(help="option of the task, name=value; repeatable")
    ] = None
    mechanisms: Annotated[
        str, Option(help="mechanisms, their options in parentheses, separated by commas")
    ] = MECHANISMS
    lrs: Annotated[str, Option(help="learning rates to choose from")] = "3e-3,1e-2"
    seeds: Annotated[str, Option(help="seeds")] = "0"
    steps: Annotated[int | None, Option(help=f"training steps of a trial [{STEPS}]")] = None
    minutes: Annotated[float | None, Option(help="training minutes of a trial, instead")] = None
    dim: Annotated[int, Option(help="width of the network")] = NETWORK.dim
    heads: Annotated[int, Option(help="heads of each mechanism")] = NETWORK.heads
    layers: Annotated[int, Option(help="layers of the network")] = NETWORK.layers
    conv: Annotated[
        int | None, Option(help=f"taps of the convolution before each mechanism on tokens [{CONV}]")
    ] = None
    batch: Annotated[int, Option(help="sequences in a training step")] = BUDGET.batch
    search: Annotated[
        float | None,
        Option(
            min=0,
            max=1,
            help="also find which of them suits which layer, within this part of the largest state",
        ),
    ] = None
    out: Annotated[Path, Option(help="folder of results; one that exists is resumed")] = Path(
        "runs/compare"
    )
    json_file: Annotated[Path | None, Option("--json", help="a further copy of the result")] = None
    launcher: Launch = "here"
    workers: Workers = None
    threads: Annotated[int | None, Option(min=1, help="processor threads [all cores]")] = None
    no_progress: Annotated[bool, Option("--no-progress", help="draw no progress bar")] = False

    def run(self) -> None:
        """Check everything, run what is missing, report."""
        with arguments_checked():
            study = self._study()
        _check_file(self.json_file)
        if self.search is not None:
            study = self._mixed(study, self.search)
        comparison = self._compared(study)
        page = _report(comparison, self.out)
        if self.json_file is not None:
            write_json(self.json_file, comparison)
        for note in comparison.notes:
            notice(note)
        console().print(_table(comparison, study.task.label))
        console().print(f"report: {page}")

    def _study(self) -> Study:
        task, more = (
            parse_spec(self.task, "task"),
            parse_options(self.task_option or [], "task-option"),
        )
        for name in more:
            if name in task.options:
                raise ArgumentError("task-option", "each option once", f"{name} twice")
        return Study(
            task=Spec(name=task.name, options={**task.options, **more}),
            mechanisms=parse_specs(self.mechanisms, "mechanisms"),
            lrs=_numbers(self.lrs, float, "lrs"),
            seeds=_numbers(self.seeds, int, "seeds"),
            network=Network(dim=self.dim, heads=self.heads, layers=self.layers, conv=self.conv),
            budget=Budget(steps=self.steps, minutes=self.minutes, batch=self.batch),
        )

    def _mixed(self, study: Study, part: float) -> Study:
        from regard.bench.mixing import with_mixture

        launched(self.launcher, self.workers, self.threads)
        with stoppable("nothing of the search is kept"), share_bar(not self.no_progress) as watch:
            return with_mixture(study, part, self.out, watch)

    def _compared(self, study: Study) -> Comparison:
        from regard.bench.compare import compare
        from regard.bench.machine import command

        launcher, told = launched(self.launcher, self.workers, self.threads), command(sys.argv[1:])
        resumed = f"finished trials are in {self.out}, the same command resumes"
        with stoppable(resumed), progress_bar(not self.no_progress) as watch:
            return compare(study, self.out, command=told, watch=watch, launcher=launcher)


def _numbers(text: str, kind: Callable[[str], N], argument: str) -> tuple[N, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        return tuple(kind(part) for part in parts)
    except ValueError as error:
        raise ArgumentError(argument, "numbers separated by commas", repr(text)) from error


def _check_file(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ArgumentError("json", "a file in an existing folder", str(path))


def _report(comparison: Comparison, out: Path) -> Path:
    from regard.report.comparison import write_comparison

    page = out / "report.html"
    write_comparison(comparison.plain(), page)
    return page


def _table(comparison: Comparison, task: str) -> Table:
    table = Table(title=f"{task}, chance {percent(comparison.chance)}")
    table.add_column("mechanism", overflow="fold")
    for name in ("accuracy", "state", "training FLOPs", "parameters", "lr", "steps to 99 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in sorted(comparison.rows, key=lambda row: -row.accuracy_mean):
        table.add_row(row.label, *_cells(row))
    return table


def _cells(row: Row) -> tuple[str, ...]:
    spread = "" if row.accuracy_std is None else f" ± {100 * row.accuracy_std:.1f}"
    return (
        f"{100 * row.accuracy_mean:.1f}{spread} %",
        "–" if row.state_bytes is None else byte_size(row.state_bytes),
        amount(row.flops_total),
        amount(row.parameters),
        f"{row.lr:g}",
        "–" if row.steps_to_99 is None else str(row.steps_to_99),
    )
