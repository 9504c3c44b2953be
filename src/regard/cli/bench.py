"""`regard bench`: speed, memory and decoding of mechanisms, and what the executors promise."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from regard.bench.spec import Spec, parse_specs
from regard.cli.measuring import stoppable
from regard.cli.output import console, notice
from regard.core.errors import ArgumentError, UnknownNameError

if TYPE_CHECKING:
    from rich.table import Table

    from regard.bench.book import Book
    from regard.bench.speed import Speed
    from regard.bench.sweep import Plan, Watch

OUT = Path("runs/bench")
MODES = "forward,backward"

Mechanisms = Annotated[
    str | None, typer.Option(help="mechanisms, their options in parentheses [all]")
]
Lengths = Annotated[str, typer.Option(help="tokens: 256..32768 doubles; or a list with commas")]
Modes = Annotated[str, typer.Option("--mode", help="forward, backward (after a forward), or both")]
Out = Annotated[Path, typer.Option(help="folder of results; one that exists is resumed")]
Threads = Annotated[int | None, typer.Option(min=1, help="processor threads [all cores]")]
Budget = Annotated[float, typer.Option(help="seconds of rounds per point")]
Cap = Annotated[
    float, typer.Option(help="seconds of one call beyond which longer inputs are left out")
]
Quiet = Annotated[bool, typer.Option("--no-progress", help="draw no progress bar")]
Publish = Annotated[
    Path | None, typer.Option(help="folder for a copy named after the day and the machine")
]

bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@bench.callback()
def main() -> None:
    """Time and weigh mechanisms beside scaled_dot_product_attention.

    Results gather in OUT/speed.json; OUT/report.html shows them.

    Example: regard bench speed --mechanisms lightning --lengths 256..4096
    """


@bench.command()
def speed(
    mechanisms: Mechanisms = None,
    lengths: Lengths = "256..32768",
    mode: Modes = MODES,
    out: Out = OUT,
    threads: Threads = None,
    budget: Budget = 1.0,
    cap: Cap = 2.0,
    publish: Publish = None,
    no_progress: Quiet = False,
) -> None:
    """Time mechanisms at every length, in turn with SDPA on the same input.

    A mechanism is compared with its own truth first: a wrong one is never timed.

    Example: regard bench speed --mechanisms sliding_window,lightning --mode forward
    """
    from regard.bench.sweep import sweep
    from regard.cli.bench_tables import speed_table

    plan = _plan(mechanisms, lengths, mode, budget, cap)
    run = _Run(out, threads, publish, no_progress)
    run.measure(lambda book, watch: sweep(plan, book, watch), speed_table)


@bench.command()
def memory(
    mechanisms: Mechanisms = None,
    lengths: Lengths = "512,2048,8192,32768",
    mode: Modes = MODES,
    out: Out = OUT,
    threads: Threads = None,
    cap: Cap = 4.0,
    publish: Publish = None,
    no_progress: Quiet = False,
) -> None:
    """Weigh the peak memory of one call, in a process of its own, beside SDPA's.

    Example: regard bench memory --mechanisms sigmoid --lengths 4096,32768 --mode forward
    """
    from regard.bench.memory import sweep_memory
    from regard.cli.bench_tables import memory_table

    plan = _plan(mechanisms, lengths, mode, 1.0, cap)
    run = _Run(out, threads, publish, no_progress)
    run.measure(lambda book, watch: sweep_memory(plan, book, watch), memory_table)


@bench.command()
def decode(
    mechanisms: Mechanisms = None,
    keys: Annotated[int, typer.Option(min=1, help="tokens before the new one")] = 65_536,
    out: Out = OUT,
    threads: Threads = None,
    budget: Budget = 1.0,
    fill: Annotated[float, typer.Option(help="seconds a layer may read them")] = 20.0,
    publish: Publish = None,
    no_progress: Quiet = False,
) -> None:
    """Time one new token after many, beside one query of SDPA over all keys.

    Example: regard bench decode --mechanisms softmax,lightning --keys 65536
    """
    from regard.bench.decode import DecodePlan
    from regard.bench.decode import decode as measure
    from regard.bench.timing import Pace
    from regard.cli.bench_tables import decode_table

    plan = DecodePlan(_specs(mechanisms), keys, Pace(budget), _seconds("fill", fill))
    run = _Run(out, threads, publish, no_progress)
    run.measure(lambda book, watch: measure(plan, book, watch), decode_table)


@bench.command()
def targets(
    only: Annotated[str | None, typer.Option(help="only targets with this in their name")] = None,
    out: Out = OUT,
    threads: Threads = None,
    budget: Budget = 2.0,
    publish: Publish = None,
    no_progress: Quiet = False,
) -> None:
    """Measure what the executors promise: ratios to SDPA, shares of the roof, peaks of memory.

    Example: regard bench targets --only window
    """
    from regard.bench.promises import measure_targets
    from regard.bench.targets import TARGETS
    from regard.bench.timing import Pace
    from regard.cli.bench_tables import target_table

    chosen = [target for target in TARGETS if only is None or only in target.name]
    if not chosen:
        raise UnknownNameError("target", str(only), sorted({target.name for target in TARGETS}))
    pace = Pace(budget, long=3)
    run = _Run(out, threads, publish, no_progress)
    run.measure(lambda book, watch: measure_targets(chosen, pace, book, watch), target_table)


class _Run:
    """One measurement from the command line: into a folder, under a progress bar, with a report."""

    def __init__(
        self, out: Path, threads: int | None, publish: Path | None, no_progress: bool
    ) -> None:
        self.out, self.threads, self.no_progress = out, threads, no_progress
        self.publish = publish

    def measure(
        self, measurement: Callable[[Book, Watch], None], table: Callable[[Speed], Table]
    ) -> None:
        """Run it, write the report, print the table."""
        import torch

        from regard.bench.book import Book
        from regard.bench.machine import command
        from regard.bench.rivals import Setting
        from regard.cli.bench_bar import points_bar
        from regard.report.speed import write_speed

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        book = Book(self.out, Setting(), command(sys.argv[1:]))
        resumed = f"finished points are in {self.out}, the same command resumes"
        with stoppable(resumed), points_bar(not self.no_progress) as watch:
            measurement(book, watch)
        page = self.out / "report.html"
        write_speed(book.speed.plain(), page)
        for note in book.speed.notes:
            notice(note)
        console().print(table(book.speed))
        console().print(f"report: {page}")
        if self.publish is not None:
            for path in book.published(self.publish):
                console().print(f"copy: {path}")


def _plan(mechanisms: str | None, lengths: str, mode: str, budget: float, cap: float) -> Plan:
    from regard.bench.rivals import Mode
    from regard.bench.sweep import Plan
    from regard.bench.timing import Pace

    known = get_args(Mode)
    modes = tuple(dict.fromkeys(part.strip() for part in mode.split(",")))
    for name in modes:
        if name not in known:
            raise UnknownNameError("mode", name, list(known))
    chosen = tuple(name for name in known if name in modes)
    return Plan(_specs(mechanisms), _lengths(lengths), chosen, Pace(budget), _seconds("cap", cap))


def _specs(mechanisms: str | None) -> tuple[Spec, ...]:
    from regard.bench.sweep import every_mechanism

    return every_mechanism() if mechanisms is None else parse_specs(mechanisms, "mechanisms")


def _lengths(text: str) -> tuple[int, ...]:
    """Numbers of tokens from "256..4096" (doubled from the first to the last) or "256,4096"."""
    first, dots, last = text.partition("..")
    try:
        lengths = [int(first), int(last)] if dots else [int(part) for part in text.split(",")]
    except ValueError as error:
        expected = "numbers such as 256,1024 or 256..4096"
        raise ArgumentError("lengths", expected, repr(text)) from error
    if dots:
        start, stop = lengths
        lengths = [start << i for i in range(64) if start > 0 and start << i <= stop]
    if not lengths or min(lengths) < 1 or len(set(lengths)) < len(lengths):
        raise ArgumentError("lengths", "numbers of tokens, each once, at least 1", repr(text))
    return tuple(sorted(lengths))


def _seconds(argument: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise ArgumentError(argument, "seconds above 0", value)
    return value
