"""A scatter with labels as geometry in pixels; a template draws it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from regard.report.axes import Axis
from regard.report.labels import Box, Placed, Scene, Segment, Wanted, place
from regard.report.units import short_percent

# One shape per family besides its colour, centred on (0, 0), of about equal area.
SHAPES = {
    "circle": "M-4.6 0a4.6 4.6 0 1 0 9.2 0a4.6 4.6 0 1 0-9.2 0z",
    "square": "M-4.1-4.1h8.2v8.2h-8.2z",
    "triangle": "M0-5.6L5.2 3.9H-5.2z",
    "diamond": "M0-5.8L5.8 0L0 5.8L-5.8 0z",
    "cross": "M-1.9-5.2h3.8v3.3h3.3v3.8h-3.3v3.3h-3.8v-3.3h-3.3v-3.8h3.3z",
    "hexagon": "M-5 0L-2.5-4.4H2.5L5 0L2.5 4.4H-2.5z",
}
CHARACTER, LINE = 6.95, 15.0  # of the monospaced 11.5 px label font, in pixels
MARKER = 6.5  # half the side of the square a marker needs
CALLOUT = 24.0  # what a frame and a column of markers add to the width of a block
SAME_PLACE = 7.0, 12.0  # points nearer than this many pixels share one label block: wide, narrow
LONGEST = 44, 30  # characters of a label before it is cut: wide, narrow
BLOCK_LINES = 8  # a longer block is split


@dataclass(frozen=True)
class Point:
    """One row of a scatter.

    low, high: the span of y over repetitions. key: index of the row in the page. series: rows of
    one series are joined by a thin line. look: CSS class of the family, shape: its marker.
    """

    x: float
    y: float
    low: float
    high: float
    label: str
    detail: str
    key: int
    series: str
    look: str
    shape: str


@dataclass(frozen=True)
class Mark:
    """A drawn point: pixel position, and the whisker's ends."""

    x: float
    y: float
    low: float
    high: float
    point: Point

    @property
    def path(self) -> str:
        """Outline of its marker."""
        return SHAPES[self.point.shape]

    @property
    def room(self) -> Box:
        """What the marker covers."""
        return Box(self.x - MARKER, self.y - MARKER, self.x + MARKER, self.y + MARKER)


@dataclass(frozen=True)
class LabelBlock:
    """Labels of the points at one place, one per line, top to bottom."""

    marks: tuple[Mark, ...]
    texts: tuple[str, ...]
    box: Box
    leader: Segment | None

    @property
    def shared(self) -> bool:
        """Whether several marks share the place: a frame holds their names and markers."""
        return len(self.marks) > 1


@dataclass(frozen=True)
class Scatter:
    """A scatter, laid out in pixels."""

    name: str
    title: str
    x_title: str
    y_title: str
    width: float
    height: float
    plot: Box
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    chance: float | None
    chance_text: str
    joins: tuple[tuple[str, str], ...]
    marks: tuple[Mark, ...]
    labels: tuple[LabelBlock, ...]
    unlabelled: tuple[str, ...]


@dataclass(frozen=True)
class ScatterText:
    """What a scatter says in words: CSS name, aria label, and the titles of its axes."""

    name: str
    title: str
    x_title: str
    y_title: str


def scatter(
    points: Sequence[Point],
    axes: tuple[Axis, Axis],
    chance: float | None,
    text: ScatterText,
    width: int,
) -> Scatter:
    """Points on (x, y) axes at a width in pixels; `chance` is a dashed line, None: no line."""
    narrow = width < 600
    height = (400 if narrow else 430) + 9 * max(len(points) - 10, 0)
    plot = Box(46, 30, width - 12, height - 46)
    inner = Box(plot.left, plot.top + 34, plot.right - 4, plot.bottom - 8)  # room for labels
    x_axis, y_axis = axes

    def across(value: float) -> float:
        return round(inner.left + x_axis.part(value) * (inner.right - inner.left), 2)

    def up(value: float) -> float:
        return round(inner.bottom - y_axis.part(value) * (inner.bottom - inner.top), 2)

    marks = tuple(Mark(across(p.x), up(p.y), up(p.low), up(p.high), p) for p in points)
    chance_at = None if chance is None or chance < y_axis.low else up(chance)
    joins = _joins(marks)
    labels, left_out = _labels(marks, joins, plot, chance_at, narrow)
    return Scatter(
        text.name, text.title, text.x_title, text.y_title, width, height, plot,
        tuple((across(t.value), t.text) for t in x_axis.ticks),
        tuple((up(t.value), t.text) for t in y_axis.ticks),
        chance_at, "" if chance is None else f"chance {short_percent(chance)}",
        tuple((line[0].point.look, " ".join(f"{m.x},{m.y}" for m in line)) for line in joins),
        marks, labels, left_out,
    )  # fmt: skip


def _joins(marks: Sequence[Mark]) -> list[list[Mark]]:
    """Marks of each series that has two or more places, from left to right."""
    series: dict[str, list[Mark]] = defaultdict(list)
    for mark in marks:
        series[mark.point.series].append(mark)
    lines = [sorted(members, key=lambda m: m.x) for members in series.values()]
    return [line for line in lines if line[0].x < line[-1].x]


def _labels(
    marks: Sequence[Mark],
    joins: Sequence[Sequence[Mark]],
    plot: Box,
    chance: float | None,
    narrow: bool,
) -> tuple[tuple[LabelBlock, ...], tuple[str, ...]]:
    """Label blocks placed in the plot, and the labels that found no room."""
    groups = _groups(marks, SAME_PLACE[narrow])
    texts = [tuple(_shortened(m.point.label, LONGEST[narrow]) for m in group) for group in groups]
    wanted = [
        Wanted(
            sum(m.x for m in group) / len(group),
            sum(m.y for m in group) / len(group),
            CHARACTER * max(map(text_columns, names)) + (CALLOUT if len(group) > 1 else 0),
            LINE * len(names) + (4 if len(group) > 1 else 0),
            tuple(m.room for m in group),
        )
        for group, names in zip(groups, texts, strict=True)
    ]
    markers = [m.room for m in marks]
    lines = [Segment(m.x, m.high, m.x, m.low) for m in marks]
    lines += [Segment(a.x, a.y, b.x, b.y) for join in joins for a, b in pairwise(join)]
    if chance is not None:
        lines.append(Segment(plot.left, chance, plot.right, chance))
        markers.append(Box(plot.right - 92, chance - 15, plot.right, chance))  # its text
    placed = place(wanted, Scene(tuple(markers), tuple(lines), plot.grown(-2)))
    blocks = [
        LabelBlock(tuple(group), names, spot.box, spot.leader)
        for group, names, spot in zip(groups, texts, placed, strict=True)
        if isinstance(spot, Placed)
    ]
    left_out = [
        m.point.label for group, p in zip(groups, placed, strict=True) if not p for m in group
    ]
    return tuple(blocks), tuple(left_out)


def _groups(marks: Sequence[Mark], apart: float) -> list[list[Mark]]:
    """Marks that lie on one another, best first, in groups of at most BLOCK_LINES."""
    groups: list[list[Mark]] = []
    for mark in sorted(marks, key=lambda m: (m.y, m.x)):
        for group in groups:
            near = math.dist((mark.x, mark.y), (group[0].x, group[0].y)) < apart
            if near and len(group) < BLOCK_LINES:
                group.append(mark)
                break
        else:
            groups.append([mark])
    return groups


def text_columns(text: str) -> float:
    """Width of a text in columns of a monospaced font; characters beyond Latin take two."""
    return sum(1 if ord(character) < 0x2E80 else 2 for character in text)


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
