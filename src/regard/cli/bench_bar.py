"""The progress bar of a measurement, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from regard.bench.sweep import Progress as Moment
    from regard.bench.sweep import Watch


@contextmanager
def points_bar(wanted: bool) -> Iterator[Watch]:
    """A watch that draws points done and what is measured now; nothing unless wanted and standard
    error is a terminal.
    """
    bar = Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=Console(stderr=True),
        disable=not (wanted and sys.stderr.isatty()),
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None)

        def watch(moment: Moment) -> None:
            bar.update(task, completed=moment.done, total=moment.total, description=moment.what)

        yield watch
