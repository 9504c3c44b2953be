"""A model and what makes passages for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from regard.core.errors import ArgumentError
from regard.core.passage import Passage

Show = Callable[[Path | None, int, int], list[Passage]]
"""Passages of a file or folder (None: of what is at hand): how many, and how many tokens each."""


@dataclass(frozen=True)
class Source:
    """Data of one kind. path: a file or folder; None: what is at hand. domain: its name, to compare
    kinds.
    """

    path: Path | None = None
    domain: str = ""

    def placed(self) -> Source:
        """The same for a process in another folder."""
        there = self.path is not None and self.path.exists()
        return replace(self, path=self.path.absolute()) if there and self.path else self


@dataclass(frozen=True, eq=False)
class Exhibit:
    """A model in evaluation mode. reads: the data it is shown, in words. notes: what stands in for
    something real.
    """

    model: Any
    reads: str
    show: Show
    notes: tuple[str, ...] = ()

    def passages(self, sources: Sequence[Source], examples: int, length: int) -> list[Passage]:
        """`examples` passages of every source.

        Raises:
            ArgumentError, UnsupportedError: data this model cannot be shown.
        """
        return [
            replace(passage, domain=source.domain)
            for source in sources
            for passage in self.show(source.path, examples, length)
        ]


def files_in(path: Path, endings: Sequence[str], reads: str, count: int) -> list[Path]:
    """A file of one of these endings as a list, or the first `count` of a folder, by name.

    Raises:
        ArgumentError: there is no such file, or there are fewer in the folder.
    """
    if path.is_file():
        found, count = [path], 1
    else:
        found = sorted(path.glob("*")) if path.is_dir() else []
    found = [file for file in found if file.suffix.lower() in endings]
    if not found:
        raise ArgumentError("data", f"{reads} ({', '.join(endings)})", path)
    if len(found) < count:
        raise ArgumentError("examples", f"at most {len(found)}, which {path} holds", count)
    return found[:count]
