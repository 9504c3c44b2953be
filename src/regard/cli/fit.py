"""`regard fit`: from a budget to a plan, with the proof."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from regard.bench.record import Record, arguments_checked
from regard.cli.launching import Launch, Workers, launched
from regard.cli.measuring import opened, watched
from regard.cli.output import console
from regard.report.units import percent

if TYPE_CHECKING:
    from regard.bench.fitting import Fit as Found
    from regard.bench.fitting import FitConfig

Argument, Option = typer.Argument, typer.Option


class Fit(Record):
    """Search what each key head should keep within a budget, and prove it.

    Measures how much the loss rises when one head alone keeps less, chooses exactly, and evaluates
    the plan beside uniform, random and recent-only plans of the same cost. Writes OUT/plan.json,
    OUT/fit.json and OUT/report.html; the same command resumes.

    Example: regard fit pocket --budget 0.25 --task needle
    """

    model: Annotated[str, Argument(help="pocket, a model's folder, or its name on the hub")] = (
        "pocket"
    )
    budget: Annotated[float, Option(help="part of the untouched model's cost, 0 to 1")] = 0.25
    unit: Annotated[str, Option(help="of the budget: bytes, tokens, flops or latency")] = "bytes"
    rule: Annotated[
        str,
        Option(help="what a head keeps: spans (sinks and the newest tokens) or snapkv (a vote)"),
    ] = "spans"
    task: Annotated[str, Option(help="needle, recall or perplexity")] = "needle"
    length: Annotated[str, Option(help="tokens of a prompt, or several with commas")] = "1024"
    examples: Annotated[int, Option(help="examples that losses are measured on")] = 48
    exams: Annotated[int, Option(help="questions that plans are evaluated on")] = 96
    seed: Annotated[int, Option(help="seed of examples and questions")] = 0
    sinks: Annotated[int, Option(help="first tokens that every head keeps")] = 4
    file: Annotated[Path | None, Option(help="text to use in place of Python's own")] = None
    later: Annotated[
        bool, Option("--later", help="ask after the prompt is cached, so that no rule can vote")
    ] = False
    out: Annotated[Path, Option(help="folder of results; one that exists is resumed")] = Path(
        "runs/fit"
    )
    device: Annotated[str, Option(help="cpu, cuda, ...")] = "cpu"
    launcher: Launch = "here"
    workers: Workers = None
    threads: Annotated[int | None, Option(min=1, help="processor threads [pocket: 1]")] = None
    no_progress: Annotated[bool, Option("--no-progress", help="draw no progress bar")] = False

    def run(self) -> None:
        """Check everything, search, evaluate, report."""
        from regard.cli.evaluate import evaluation_table
        from regard.report.fit import write_fit

        with arguments_checked():
            config = self._config()
        fit, page = self._fitted(config), self.out / "report.html"
        write_fit(fit.plain(), page)
        console().print(groups_table(fit))
        console().print(evaluation_table(fit.evaluation))
        for note in fit.notes:
            console().print(f"note: {note}")
        console().print(f"plan: {self.out / 'plan.json'}")
        console().print(f"report: {page}")

    def _config(self) -> FitConfig:
        from regard.bench.fitting import FitConfig
        from regard.cli.evaluate import lengths

        return FitConfig.model_validate(
            {
                "budget": self.budget,
                "unit": self.unit,
                "rule": self.rule,
                "task": self.task,
                "lengths": lengths(self.length),
                "examples": self.examples,
                "exams": self.exams,
                "seed": self.seed,
                "sinks": self.sinks,
                "file": None if self.file is None else str(self.file),
                "later": self.later,
            }
        )

    def _fitted(self, config: FitConfig) -> Found:
        from regard.bench.fit import fit
        from regard.bench.machine import command

        launcher = launched(self.launcher, self.workers, self.threads)
        subject, told = opened(self.model, self.device, self.threads), command(sys.argv[1:])
        with watched(self.out, not self.no_progress) as watch:
            return fit(config, subject, self.out, command=told, watch=watch, launcher=launcher)


def groups_table(fit: Found) -> Table:
    """One line per key head: what it got, and why."""
    title = f"{fit.config.task} within {percent(fit.config.budget)} of {fit.config.unit}"
    table = Table(title=title, title_justify="left")
    for name in ("layer", "key head", "keeps", "rise at the least", "its query heads"):
        table.add_column(name, justify="right" if name != "its query heads" else "left")
    for group in fit.groups:
        most = max(group.metrics.items(), key=lambda item: item[1], default=("", 0.0))
        table.add_row(
            str(group.layer),
            str(group.kv_head),
            percent(group.share),
            f"{group.rises[0]:.3f}",
            f"{most[0]} {most[1]:.2f}",
        )
    return table
