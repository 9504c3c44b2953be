"""Charts of lines over one axis as geometry in pixels; a template draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from regard.report.axes import Axis, fitting_axis
from regard.report.colours import SERIES
from regard.report.curves import path
from regard.report.labels import Box

Point = tuple[float, float]
MARKED = 40
"""Lines of more points are drawn without markers."""
BUCKETS = 400
"""Parts of a long line, of each of which the lowest and the highest point are drawn."""
HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 260.0, 52.0, 26.0, 12.0, 42.0


@dataclass(frozen=True)
class Line:
    """One line: its name, look and marker, the paths through its points, its markers."""

    label: str
    look: str
    shape: str
    dashed: bool
    paths: tuple[str, ...]
    dots: tuple[Point, ...]


@dataclass(frozen=True)
class LineChart:
    """A chart: sizes and places in pixels, ticks with their texts."""

    title: str
    x_title: str
    y_title: str
    width: float
    height: float
    plot: Box
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    zero: float | None
    lines: tuple[Line, ...]


def line_chart(
    titles: tuple[str, str, str],
    lines: Mapping[str, Sequence[Point]],
    *,
    width: float = 440.0,
    height: float = HEIGHT,
    whole: bool = False,
) -> LineChart:
    """A chart of named lines.

    titles: of the chart, of its x and of its y axis. whole: x are whole numbers. Points that are
    not finite interrupt a line.
    """
    found = {name: [(float(x), float(y)) for x, y in points] for name, points in lines.items()}
    finite = [p for points in found.values() for p in points if _finite(p)] or [(0, 0), (1, 1)]
    whole = whole or all(x == round(x) for x, _ in finite)
    x_axis = fitting_axis([x for x, _ in finite], most=5, whole=whole)
    y_axis = fitting_axis([y for _, y in finite], most=5)
    plot = Box(LEFT, TOP, width - RIGHT, height - BOTTOM)
    crossing = not y_axis.log and y_axis.low < 0 < y_axis.high
    return LineChart(
        *titles,
        width,
        height,
        plot,
        tuple((_x(plot, x_axis, t.value), t.text) for t in x_axis.ticks),
        tuple((_y(plot, y_axis, t.value), t.text) for t in y_axis.ticks),
        _y(plot, y_axis, 0.0) if crossing else None,
        tuple(
            _line(i, name, points, plot, (x_axis, y_axis))
            for i, (name, points) in enumerate(found.items())
        ),
    )


def _line(
    index: int, name: str, points: Sequence[Point], plot: Box, axes: tuple[Axis, Axis]
) -> Line:
    look, shape = SERIES[index % len(SERIES)]
    runs: list[list[Point]] = [[]]
    for point in points:
        if not _finite(point):
            runs.append([])
            continue
        runs[-1].append((_x(plot, axes[0], point[0]), _y(plot, axes[1], point[1])))
    thinned = [_thinned(run) for run in runs if run]
    marked = len(points) <= MARKED
    dots = tuple(p for run in thinned if marked or len(run) == 1 for p in run)
    drawn = tuple(path(run) for run in thinned if len(run) > 1)
    return Line(name, look, shape, index >= len(SERIES), drawn, dots)


def _thinned(run: list[Point]) -> list[Point]:
    """A long line with the lowest and the highest point of each of its parts."""
    if len(run) <= 2 * BUCKETS:
        return run
    size = -(-len(run) // BUCKETS)
    found = []
    for start in range(0, len(run), size):
        part = range(start, min(start + size, len(run)))
        ends = {min(part, key=lambda i: run[i][1]), max(part, key=lambda i: run[i][1])}
        found += [run[i] for i in sorted(ends)]
    return found


def _finite(point: Point) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])


def _x(plot: Box, axis: Axis, value: float) -> float:
    return round(plot.left + axis.part(value) * (plot.right - plot.left), 1)


def _y(plot: Box, axis: Axis, value: float) -> float:
    return round(plot.bottom - axis.part(value) * (plot.bottom - plot.top), 1)
