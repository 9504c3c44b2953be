"""`regard evaluate`: what plans do to a model's quality, cache and speed."""

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
from regard.core.errors import ArgumentError, UnknownNameError
from regard.report.units import byte_size, percent

if TYPE_CHECKING:
    from regard.bench.evaluation import Evaluation, EvaluationRow, Inquiry, Task
    from regard.bench.exams import Score

Argument, Option = typer.Argument, typer.Option


class Evaluate(Record):
    """Measure what plans do to a model, beside the model as it is.

    Quality, bytes of the cache, time to read a prompt and to decode. Every finished part is kept in
    OUT: the same command resumes. OUT/report.html shows the result, OUT/evaluation.json holds it.

    Example: regard evaluate --plan snapkv.json --plan stream.json --task needle,perplexity
    """

    model: Annotated[str, Argument(help="pocket, a model's folder, or its name on the hub")] = (
        "pocket"
    )
    plan: Annotated[list[Path] | None, Option(help="a plan's JSON file; repeatable")] = None
    task: Annotated[str, Option(help="needle, recall, perplexity, or several with commas")] = (
        "needle,recall,perplexity"
    )
    length: Annotated[str, Option(help="tokens of a prompt, or several with commas")] = "1024"
    examples: Annotated[int, Option(help="questions per task; passages are an eighth as many")] = 64
    seed: Annotated[int, Option(help="seed of the questions")] = 0
    tokens: Annotated[int, Option(help="tokens decoded for timing")] = 32
    seconds: Annotated[float, Option(help="seconds of timing at each length")] = 5.0
    file: Annotated[Path | None, Option(help="text to use in place of Python's own")] = None
    later: Annotated[
        bool, Option("--later", help="ask after the prompt is cached, so that no rule can vote")
    ] = False
    out: Annotated[Path, Option(help="folder of results; one that exists is resumed")] = Path(
        "runs/evaluate"
    )
    device: Annotated[str, Option(help="cpu, cuda, ...")] = "cpu"
    launcher: Launch = "here"
    workers: Workers = None
    threads: Annotated[int | None, Option(min=1, help="processor threads [pocket: 1]")] = None
    no_progress: Annotated[bool, Option("--no-progress", help="draw no progress bar")] = False

    def run(self) -> None:
        """Check everything, measure what is missing, report."""
        from regard.report.evaluation import write_evaluation

        with arguments_checked():
            inquiry = self._inquiry()
        evaluation, page = self._evaluated(inquiry), self.out / "report.html"
        write_evaluation(evaluation.plain(), page)
        console().print(evaluation_table(evaluation))
        for note in evaluation.notes:
            console().print(f"note: {note}")
        console().print(f"report: {page}")

    def _inquiry(self) -> Inquiry:
        from regard.bench.evaluation import Inquiry, named_plans

        if not self.plan:
            raise ArgumentError("plan", "at least one --plan FILE", "none")
        return Inquiry(
            plans=named_plans(self.plan),
            tasks=_tasks(self.task),
            lengths=lengths(self.length),
            examples=self.examples,
            seed=self.seed,
            tokens=self.tokens,
            seconds=self.seconds,
            file=None if self.file is None else str(self.file),
            later=self.later,
        )

    def _evaluated(self, inquiry: Inquiry) -> Evaluation:
        from regard.bench.evaluate import evaluate
        from regard.bench.machine import command

        launcher = launched(self.launcher, self.workers, self.threads)
        subject, told = opened(self.model, self.device, self.threads), command(sys.argv[1:])
        with watched(self.out, not self.no_progress) as watch:
            return evaluate(
                inquiry, subject, self.out, command=told, watch=watch, launcher=launcher
            )


def evaluation_table(evaluation: Evaluation) -> Table:
    """One line per plan and length, the untouched model first."""
    several = len(evaluation.lengths) > 1
    where = "" if several else f", {evaluation.lengths[0]:,} tokens"
    table = Table(title=f"plans on {evaluation.subject.name}{where}, seed {evaluation.seed}")
    table.add_column("plan", overflow="fold")
    names = [*(["length"] if several else []), *evaluation.tasks]
    for name in (*names, "cache", "kept", "removed", "prefill", "per token"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in evaluation.rows:
        table.add_row(
            row.label,
            *([f"{row.length:,}"] if several else []),
            *(_score(row, task) for task in evaluation.tasks),
            *_costs(row),
        )
    return table


def _score(row: EvaluationRow, task: str) -> str:
    from regard.report.frontier import interval_text, score_text

    score: Score = row.scores[task]
    said = score_text(score.kind, score.value)
    interval = interval_text(score.low, score.high)
    parts = [interval, f"n {score.asked}"] if interval else []
    parts += ["chance"] if task in row.at_chance else []
    return f"{said} ({', '.join(parts)})" if parts else said


def _costs(row: EvaluationRow) -> tuple[str, ...]:
    from regard.report.speed import time_span

    return (
        byte_size(row.cache_bytes),
        percent(row.budget),
        percent(row.compression_ratio),
        time_span(row.prefill_seconds.median),
        time_span(row.decode_seconds.median),
    )


def _tasks(text: str) -> tuple[Task, ...]:
    from regard.bench.evaluation import TASKS

    found = [part.strip() for part in text.split(",") if part.strip()]
    for name in found:
        if name not in TASKS:
            raise UnknownNameError("task", name, list(TASKS))
    if not found:
        raise ArgumentError("task", f"some of {', '.join(TASKS)}", repr(text))
    return tuple(task for name in found for task in TASKS if task == name)


def lengths(text: str) -> tuple[int, ...]:
    """Numbers of tokens, with commas between them."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ArgumentError("length", "numbers of tokens such as 256,1024", repr(text)) from error
