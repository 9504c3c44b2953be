"""The report of an evaluation: what plans do to a model's quality, cache and speed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regard.report.axes import accuracy_axis, log_axis
from regard.report.chart import SHAPES, Point, Scatter, ScatterText, scatter
from regard.report.evaluation_record import Evaluation, Row, Score, read_evaluation
from regard.report.page import page, write_page
from regard.report.speed import time_span
from regard.report.units import amount, byte_size, percent, short_percent

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
NEARLY = 0.95  # of the untouched model's accuracy counts as kept


@dataclass(frozen=True)
class Entry:
    """One row as the page shows it; `key` links its marks and its table row."""

    key: int
    row: Row
    look: str
    shape: str


def evaluation_html(evaluation: Mapping[str, Any]) -> str:
    """One self-contained HTML page of an evaluation of schema "regard.evaluation/1".

    Raises:
        ArgumentError: another schema, or a field that is missing or of the wrong kind.
    """
    read = read_evaluation(evaluation)
    entries = _entries(read)
    plans = [e for e in entries if e.row.plan and e.row.length == read.lengths[0]]
    return page(
        "evaluation.html.j2",
        {
            "title": f"Plans on {read.subject.name}",
            "evaluation": read,
            "finding": _finding(read),
            "facts": _facts(read),
            "entries": entries,
            "charts": [
                (length, task, _scatters([e for e in entries if e.row.length == length], task))
                for length in read.lengths
                for task in read.tasks
                if read.at(length)[0].scores[task].kind == "accuracy"
            ],
            "plans": plans,
            "anchors": {e.row.label: e.key for e in plans},
            "shapes": SHAPES,
            "score_text": score_text,
            "interval_text": interval_text,
            "time_span": time_span,
            "json": lambda value: json.dumps(value, ensure_ascii=False),
        },
    )


def write_evaluation(evaluation: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the page of an evaluation to a file, whole or not at all.

    Raises:
        ArgumentError: as `evaluation_html`; or the path is not a file in an existing folder.
    """
    write_page(evaluation_html(evaluation), path)


def score_text(kind: str, value: float | None) -> str:
    """An accuracy in percent, a perplexity to three digits."""
    if value is None:
        return "no number"
    return percent(value) if kind == "accuracy" else f"{value:.3g}"


def interval_text(low: float | None, high: float | None) -> str:
    """The interval of an accuracy, in percent."""
    return "" if low is None or high is None else f"{100 * low:.0f} to {percent(high, 0)}"


def _entries(read: Evaluation) -> list[Entry]:
    names = dict.fromkeys(row.label for row in read.rows if row.plan is not None)
    looks = {name: PLANS[i % len(PLANS)] for i, name in enumerate(names)}
    return [Entry(key, row, *looks.get(row.label, UNTOUCHED)) for key, row in enumerate(read.rows)]


def _scatters(entries: Sequence[Entry], task: str) -> list[Scatter]:
    """Accuracy against the cache's bytes at one length, wide and narrow."""
    shown = [e for e in entries if e.row.cache_bytes and e.row.scores[task].value is not None]
    if not shown:
        return []
    points = [_point(entry, entry.row.scores[task]) for entry in shown]
    y_axis = accuracy_axis(min(point.low for point in points))
    text = ScatterText(
        f"{task}-{shown[0].row.length}",
        f"Accuracy on {task} against cache size, one mark per row of the table",
        "Cache of one sequence (bytes, log scale)",
        "Accuracy",
    )
    chance = shown[0].row.scores[task].chance
    sizes = [point.x for point in points]
    return [
        scatter(points, (log_axis(sizes, byte_size, base=2, most=most), y_axis), chance, text, wide)
        for wide, most in ((WIDE, 9), (NARROW, 5))
    ]


def _point(entry: Entry, score: Score) -> Point:
    row, value = entry.row, score.value or 0.0
    low, high = score.low or 0.0, 1.0 if score.high is None else score.high
    span = interval_text(low, high)
    detail = f"{row.label}: {percent(value)} ({span}), cache {byte_size(row.cache_bytes)}"
    return Point(
        float(row.cache_bytes), value, low, high, row.label, detail, entry.key, row.label,
        entry.look, entry.shape,
    )  # fmt: skip


def _finding(read: Evaluation) -> str:
    """What was found at the longest length, in numbers."""
    dense, *others = read.at(max(read.lengths))
    sentences = []
    for task, score in dense.scores.items():
        if score.kind != "accuracy" or score.value is None:
            continue
        if task in dense.at_chance:
            sentences.append(f"The untouched model is at chance at {task}.")
            continue
        kept = [r for r in others if (r.scores[task].value or 0.0) >= NEARLY * score.value]
        kept.sort(key=lambda row: row.cache_bytes)
        said = f"On {task} at {dense.length:,} tokens the untouched model scores "
        said += f"{percent(score.value)}; {len(kept) or 'none'} of {len(others)} "
        said += f"{'plan keeps' if len(others) == 1 else 'plans keep'} 95\u202f% of that"
        if kept:
            least = kept[0]
            share = short_percent(least.budget)
            said += f", {least.label} with the smallest cache: {share} of the bytes"
        sentences.append(said + ".")
    return " ".join(sentences) or "Only perplexity was measured."


def _facts(read: Evaluation) -> list[tuple[str, str]]:
    """The setting in a few numbers."""
    subject = read.subject
    facts = [
        ("model", subject.architecture),
        ("parameters", amount(subject.parameters)),
        ("numbers", subject.dtype),
        ("tokens", ", ".join(f"{length:,}" for length in read.lengths)),
    ]
    facts += [("questions", str(o["examples"])) for t, o in read.tasks.items() if t == "needle"]
    return [*facts, ("seed", str(read.seed))]
