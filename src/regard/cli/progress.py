"""The progress bars of a comparison and of an atlas, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from regard.bench.compare import Progress as Moment


@contextmanager
def progress_bar(wanted: bool) -> Iterator[Callable[[Moment], None]]:
    """A watch for `compare` that draws trials done, time left, and how the running trial fares.

    Nothing is drawn unless wanted and standard error is a terminal.
    """
    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("trials"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    shown = wanted and sys.stderr.isatty()
    bar = Progress(
        *columns,
        console=Console(stderr=True),
        disable=not shown,
        transient=True,
        speed_estimate_period=600,
    )
    with bar:
        task = bar.add_task("", total=None)

        def watch(moment: Moment) -> None:
            bar.update(
                task, completed=moment.done, total=moment.total, description=_description(moment)
            )

        yield watch


@contextmanager
def share_bar(wanted: bool) -> Iterator[Callable[[float, str], None]]:
    """A watch that draws the share that is done and what is being done; drawn as `progress_bar`."""
    what_now = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(bar_width=24), TimeElapsedColumn(), what_now)
    shown = wanted and sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def watch(share: float, what: str) -> None:
            bar.update(task, completed=share, description=what)

        yield watch


def _description(moment: Moment) -> str:
    if moment.trial is None:
        return ""
    where = moment.trial.label
    return where if moment.accuracy is None else f"{where}: {moment.accuracy:.0%}"
