"""An atlas by a launcher: the parts of a survey as records, and the job of measuring one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from regard.atlases.piece import Part, Piece
from regard.atlases.record import Atlas
from regard.atlases.survey import Survey
from regard.bench.launching import Launcher, Tell
from regard.bench.showing.exhibit import Exhibit, Source
from regard.bench.showing.opening import open_model
from regard.bench.subject import check_same, fingerprint, placed
from regard.plan import Plan

Told = Callable[[float, str], None]


@dataclass(frozen=True)
class Surveying:
    """The job: one part of an atlas. model: its name; sources: what it is shown, with `examples`
    passages of `length` tokens of each; probes, kept, plan: see `regard.atlas`. expected: the
    fingerprint that the model must have, if one is known.
    """

    model: str
    sources: tuple[Source, ...]
    examples: int
    length: int
    probes: str | tuple[str, ...]
    kept: int
    plan: Plan | None = None
    expected: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process it opens the same model there."""
        return type(self), (
            placed(self.model),
            tuple(source.placed() for source in self.sources),
            self.examples,
            self.length,
            self.probes,
            self.kept,
            self.plan,
            fingerprint(self.exhibit.model),
        )

    @cached_property
    def exhibit(self) -> Exhibit:
        """The model and what shows it something.

        Raises:
            ArgumentError: it is not the expected one.
        """
        found = open_model(self.model)
        if self.expected:
            check_same(found.model, self.model, self.expected)
        return found

    @cached_property
    def survey(self) -> Survey:
        """The whole atlas to be made."""
        passages = self.exhibit.passages(self.sources, self.examples, self.length)
        return Survey.of(
            self.exhibit.model, passages, self.probes, examples=self.kept, plan=self.plan
        )

    def name(self, part: Part) -> str:
        return part.label

    def __call__(self, part: Part, tell: Tell) -> Piece:
        tell(part.label)
        return self.survey.measured(part)


def surveyed(job: Surveying, launcher: Launcher, told: Told) -> Atlas:
    """The atlas of a job; the same one whatever the launcher. told: gets the share that is done and
    what is being measured.

    Raises:
        LostError: parts whose workers were killed.
    """
    began, parts = time.perf_counter(), job.survey.parts
    pieces: dict[Part, Piece] = {}

    def watch(part: Part, label: str) -> None:
        told(len(pieces) / len(parts), label)

    for part, piece in launcher.map(job, parts, watch):
        pieces[part] = piece
        told(len(pieces) / len(parts), part.label)
    return job.survey.atlas([pieces[part] for part in parts], time.perf_counter() - began)
