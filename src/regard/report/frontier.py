"""Plans beside the untouched model as marks: quality against what they cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from regard.report.axes import Axis, accuracy_axis, fitting_axis, log_axis
from regard.report.chart import SHAPES, Point, Scatter, ScatterText, scatter
from regard.report.evaluation_record import Evaluation, Row, Score
from regard.report.speed import time_span
from regard.report.units import byte_size, percent

UNTOUCHED = ("f-other", "hexagon")
# CSS class and marker of the plans, in their order, again and again.
PLANS = (
    ("f-scored", "circle"),
    ("f-recurrent", "square"),
    ("f-selected", "triangle"),
    ("f-pooled", "diamond"),
    ("f-free", "cross"),
)
WIDE, NARROW = 920, 380  # pixels of the two drawings of each scatter; the page shows one


@dataclass(frozen=True)
class Entry:
    """One row as a page shows it; `key` links its marks and its table row, marks of one `series`
    are joined.
    """

    key: int
    row: Row
    series: str
    look: str
    shape: str


@dataclass(frozen=True)
class Against:
    """A cost that quality is drawn against: a suffix of the drawing's name, what it is called, the
    axis' title, the value of a row and its text, the base of the axis' ticks.
    """

    suffix: str
    called: str
    title: str
    value: Callable[[Row], float]
    text: Callable[[float], str]
    base: int


BYTES = Against(
    "", "cache size", "Cache of one sequence (bytes, log scale)",
    lambda row: float(row.cache_bytes), byte_size, 2,
)  # fmt: skip
SECONDS = Against(
    "-seconds", "time per decoded token", "Seconds per decoded token (median, log scale)",
    lambda row: row.decode_seconds.median, time_span, 10,
)  # fmt: skip


def entries_of(
    rows: Iterable[Row], series: Callable[[str], str] = lambda label: label
) -> list[Entry]:
    """The rows with their looks; plans whose labels are of one series look alike."""
    rows = list(rows)
    names = dict.fromkeys(series(row.label) for row in rows if row.plan is not None)
    looks = {name: PLANS[i % len(PLANS)] for i, name in enumerate(names)}
    return [
        Entry(key, row, row.label, *UNTOUCHED)
        if row.plan is None
        else Entry(key, row, series(row.label), *looks[series(row.label)])
        for key, row in enumerate(rows)
    ]


def frontier(entries: Sequence[Entry], task: str, against: Against = BYTES) -> list[Scatter]:
    """Quality at a task against a cost at one length, wide and narrow; nothing where there are no
    numbers.
    """
    shown = [
        e for e in entries if against.value(e.row) > 0 and e.row.scores[task].value is not None
    ]
    if not shown:
        return []
    score = shown[0].row.scores[task]
    quality = score.kind.capitalize()
    points = [_point(entry, entry.row.scores[task], against) for entry in shown]
    y_axis = _quality_axis(score.kind, points)
    text = ScatterText(
        f"{task}-{shown[0].row.length}{against.suffix}",
        f"{quality} on {task} against {against.called}, one mark per row of the table",
        against.title,
        quality if score.kind == "accuracy" else f"{quality} (lower is better)",
    )
    costs = [point.x for point in points]
    chance = score.chance if score.kind == "accuracy" else None
    return [
        scatter(
            points,
            (log_axis(costs, against.text, base=against.base, most=most), y_axis),
            chance, text, wide,
        )
        for wide, most in ((WIDE, 9), (NARROW, 5))
    ]  # fmt: skip


def _quality_axis(kind: str, points: Sequence[Point]) -> Axis:
    if kind == "accuracy":
        return accuracy_axis(min(point.low for point in points))
    return fitting_axis([point.y for point in points])


def _point(entry: Entry, score: Score, against: Against) -> Point:
    row, value = entry.row, score.value or 0.0
    if score.kind == "accuracy":
        low, high = score.low or 0.0, 1.0 if score.high is None else score.high
    else:
        low = high = value
    said = " ".join(filter(None, (score_text(score.kind, value), _in_brackets(score))))
    detail = f"{row.label}: {said}, {against.called} {against.text(against.value(row))}"
    return Point(
        against.value(row), value, low, high, row.label, detail, entry.key, entry.series,
        entry.look, entry.shape,
    )  # fmt: skip


def shown(read: Evaluation, entries: Sequence[Entry]) -> dict[str, Any]:
    """What the templates of rows and plans expect."""
    plans = [e for e in entries if e.row.plan and e.row.length == read.lengths[0]]
    return {
        "evaluation": read,
        "entries": entries,
        "plans": plans,
        "anchors": {e.row.label: e.key for e in plans},
        "shapes": SHAPES,
        "score_text": score_text,
        "interval_text": interval_text,
        "time_span": time_span,
        "json": lambda value: json.dumps(value, ensure_ascii=False),
    }


def score_text(kind: str, value: float | None) -> str:
    """An accuracy in percent, a perplexity to three digits."""
    if value is None:
        return "no number"
    return percent(value) if kind == "accuracy" else f"{value:.3g}"


def interval_text(low: float | None, high: float | None) -> str:
    """The interval of an accuracy, in percent."""
    return "" if low is None or high is None else f"{100 * low:.0f} to {percent(high, 0)}"


def _in_brackets(score: Score) -> str:
    span = interval_text(score.low, score.high)
    return f"({span})" if span else ""
