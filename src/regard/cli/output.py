"""Where verbs print: results to standard output, all else to standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console

PIPE_WIDTH = 200  # a file or a pipe has no edge at which a table would have to be cut


def console() -> Console:
    """The console of results; text is printed as it is, brackets are no markup."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, markup=False, highlight=False, soft_wrap=not sys.stdout.isatty())


def tell(heading: str, formula: str, sections: Iterable[tuple[str, list[str]]]) -> None:
    """A card in full: its heading and formula, then those titled lists that are not empty."""
    screen = console()
    screen.print(f"{heading}\n", style="bold")
    screen.print(formula)
    for title, lines in sections:
        if lines:
            screen.print(f"\n{title}", style="bold")
            for line in lines:
                screen.print(f"  {line}")


def notice(text: str) -> None:
    """One line to standard error."""
    Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(text)
