"""Pieces of an atlas: each is measured by itself, in this process or another, and put together."""

from __future__ import annotations

from dataclasses import dataclass, field

from regard.atlases.examples import Strongest
from regard.atlases.means import Gathered


@dataclass(frozen=True)
class Part:
    """What is measured at once: one experiment, or, without one, all readings on one passage."""

    experiment: str = ""
    passage: int = 0

    @property
    def label(self) -> str:
        """How it is called."""
        return self.experiment or f"readings of passage {self.passage}"


@dataclass(eq=False)
class Piece:
    """What was found in a part. notes: why something could not be served."""

    strongest: Strongest
    gathered: Gathered = field(default_factory=Gathered)
    notes: dict[str, str] = field(default_factory=dict)

    def merge(self, later: Piece) -> None:
        """Take in the piece of a later part."""
        self.gathered.merge(later.gathered)
        self.strongest.merge(later.strongest)
        for where, why in later.notes.items():
            self.notes.setdefault(where, why)
