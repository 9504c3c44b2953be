"""What verbs that measure share: how a model is opened, and how Ctrl-C ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from regard.cli.output import notice

if TYPE_CHECKING:
    from regard.bench.subject import Subject
    from regard.bench.sweep import Watch

INTERRUPTED = 130  # what a shell reports after Ctrl-C


@contextmanager
def stoppable(said: str) -> Iterator[None]:
    """Inside, Ctrl-C says one line on standard error and ends the command."""
    try:
        yield
    except KeyboardInterrupt:
        notice(f"stopped; {said}")
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def watched(out: Path, wanted: bool) -> Iterator[Watch]:
    """A watch, drawn if wanted, of parts that are kept in a folder as they finish: Ctrl-C says how
    to go on.
    """
    from regard.cli.bench_bar import points_bar

    resumed = f"finished parts are in {out}, the same command resumes"
    with stoppable(resumed), points_bar(wanted) as watch:
        yield watch


def opened(model: str, device: str, threads: int | None) -> Subject:
    """The model of that name, and so many processor threads; one for the pocket model where no
    number is given.
    """
    import torch

    from regard.bench.subject import POCKET, load

    if threads is not None or model == POCKET:
        torch.set_num_threads(threads or 1)  # its products are too small to share
    return load(model, device)
