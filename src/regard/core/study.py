"""Studies: a paper's finding made again at pocket size, its figures beside what the paper expects.

A study is a frozen dataclass whose fields are sizes, steps and the seed; running it gives figures
with the bounds within which the finding holds, and curves and maps to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from regard.core.card import Claim, Documented, Golden, Paper

Progress = Callable[[float], None]
"""Told the share that is done, from 0 to 1."""


@dataclass(frozen=True)
class Figure:
    """One number of a study. expected: the paper's expectation in words. low, high: the bounds
    within which it holds; None: open on that side.
    """

    name: str
    value: float
    expected: str
    low: float | None = None
    high: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the value lies within its bounds; NaN never does."""
        above = self.low is None or self.value >= self.low
        below = self.high is None or self.value <= self.high
        return self.value == self.value and above and below


@dataclass(frozen=True)
class Curve:
    """Lines over one axis: name -> points (x, y)."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Map:
    """A matrix as a picture: values[row][column]."""

    title: str
    rows: str
    columns: str
    values: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Outcome:
    """What a study found."""

    figures: tuple[Figure, ...]
    curves: tuple[Curve, ...] = ()
    maps: tuple[Map, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every figure lies within its bounds."""
        return all(figure.holds for figure in self.figures)


class Study(Protocol):
    """An experiment to repeat; equal fields give equal outcomes."""

    def run(self, progress: Progress) -> Outcome:
        """Do it, reporting progress."""
        ...


@dataclass(frozen=True)
class StudyCard(Documented):
    """One study. build: a frozen dataclass that is a Study, its fields the options. seconds: about
    how long its default takes on two cores. small: options with which it runs in a second or two,
    for tests of the machinery (its bounds need not hold then).
    """

    name: str
    build: Callable[..., Study]
    papers: tuple[Paper, ...]
    claim: Claim
    seconds: int
    small: Mapping[str, Any] = field(default_factory=dict)
    goldens: tuple[Golden, ...] = ()
