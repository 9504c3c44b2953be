"""Where verbs print: results to standard output, all else to standard error."""

from __future__ import annotations

import sys

from rich.console import Console

PIPE_WIDTH = 200  # a file or a pipe has no edge at which a table would have to be cut


def console() -> Console:
    """The console of results; text is printed as it is, brackets are no markup."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, markup=False, highlight=False, soft_wrap=not sys.stdout.isatty())


def notice(text: str) -> None:
    """One line to standard error."""
    Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(text)
