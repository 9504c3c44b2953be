"""The report of a comparison: what was found, charts, table, methods, and how it was made."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regard.report.axes import Axis, accuracy_axis, log_axis, step_axis
from regard.report.chart import SHAPES, Point, Scatter, ScatterText, scatter
from regard.report.curves import Panel, PanelFrame, panel
from regard.report.finding import finding
from regard.report.labels import Box
from regard.report.page import page, write_page
from regard.report.record import Comparison, Row, read_comparison
from regard.report.units import amount, byte_size, percent, short_percent

# CSS class and marker of each family; a family of somebody's own gets the last one.
LOOKS = {
    "scored": ("f-scored", "circle"),
    "recurrent": ("f-recurrent", "square"),
    "selected": ("f-selected", "triangle"),
    "pooled": ("f-pooled", "diamond"),
    "free": ("f-free", "cross"),
}
OTHER = ("f-other", "hexagon")
WIDE, NARROW = 920, 380  # pixels of the two drawings of each scatter; the page shows one


@dataclass(frozen=True)
class Entry:
    """One row as the page shows it; `key` links its marks, curve, table row and method."""

    key: int
    row: Row
    look: str
    shape: str
    panel: Panel
    lr_at_edge: bool


@dataclass(frozen=True)
class Method:
    """A mechanism and the entries that are variants of it."""

    first: Entry
    entries: tuple[Entry, ...]


def comparison_html(comparison: Mapping[str, Any]) -> str:
    """One self-contained HTML page of a comparison of schema "regard.comparison/1".

    Raises:
        ArgumentError: another schema, or a field that is missing or of the wrong kind.
    """
    read = read_comparison(comparison)
    accuracy = accuracy_axis(min([min(r.seeds) for r in read.rows if r.seeds], default=0.0))
    last = max((p.step for r in read.rows for c in r.curves for p in c.points), default=0)
    frame = PanelFrame(step_axis(last), accuracy_axis(0), Box(36, 8, 214, 112))
    entries = _entries(read, frame)
    return page(
        "comparison.html.j2",
        {
            "title": f"Attention on {read.task_name}",
            "comparison": read,
            "finding": finding(read),
            "facts": _facts(read, last),
            "entries": entries,
            "families": {e.row.family: e for e in reversed(entries)},
            "shapes": SHAPES,
            "state": _state_scatters(read, entries, accuracy),
            "compute": _compute_scatters(read, entries, accuracy),
            "undecodable": [e for e in entries if e.row.state_bytes is None],
            "stateless": [e for e in entries if e.row.state_bytes == 0],
            "unmeasured": [e for e in entries if e.row.accuracy_mean is None],
            "frame": frame,
            "chance_at": frame.at(0, read.chance)[1],
            "methods": _methods(entries),
            "making": _making(read),
        },
    )


def write_comparison(comparison: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the page of a comparison to a file, whole or not at all.

    Raises:
        ArgumentError: as `comparison_html`; or the path is not a file in an existing folder.
    """
    write_page(comparison_html(comparison), path)


def _entries(read: Comparison, frame: PanelFrame) -> list[Entry]:
    entries = []
    for key, row in enumerate(read.rows):
        look, shape = LOOKS.get(row.family, OTHER)
        curves = panel(
            frame,
            [curve.measured for curve in row.curves],
            [curve.diverged for curve in row.curves],
            row.steps_to_99,
        )
        edge = len(row.lrs) > 2 and row.lr in (min(row.lrs), max(row.lrs))
        entries.append(Entry(key, row, look, shape, curves, edge))
    return entries


def _state_scatters(read: Comparison, entries: Sequence[Entry], accuracy: Axis) -> list[Scatter]:
    """Accuracy against the bytes a decoder carries, wide and narrow; none without a state."""
    shown = [e for e in entries if e.row.state_bytes]
    text = ScatterText(
        "state", "Accuracy against decode state, one mark per row of the table",
        "Decode state of one sequence (bytes, log scale)", "Test accuracy",
    )  # fmt: skip
    return _scatters(
        read,
        [_point(e, float(e.row.state_bytes or 0)) for e in shown if e.row.seeds],
        lambda values, most: log_axis(values, byte_size, base=2, most=most),
        accuracy,
        text,
    )


def _compute_scatters(read: Comparison, entries: Sequence[Entry], accuracy: Axis) -> list[Scatter]:
    """Accuracy against the operations training took, wide and narrow."""
    text = ScatterText(
        "compute", "Accuracy against training compute, one mark per row of the table",
        "Training compute (FLOPs, log scale)", "Test accuracy",
    )  # fmt: skip
    return _scatters(
        read,
        [_point(e, e.row.flops_total) for e in entries if e.row.seeds and e.row.flops_total],
        lambda values, most: log_axis(values, amount, most=most),
        accuracy,
        text,
    )


def _scatters(
    read: Comparison,
    points: Sequence[Point],
    x_axis: Callable[[Sequence[float], int], Axis],
    y_axis: Axis,
    text: ScatterText,
) -> list[Scatter]:
    if not points:
        return []
    return [
        scatter(points, (x_axis([p.x for p in points], most), y_axis), read.chance, text, width)
        for width, most in ((WIDE, 9), (NARROW, 5))
    ]


def _point(entry: Entry, x: float) -> Point:
    row = entry.row
    mean = row.accuracy_mean if row.accuracy_mean is not None else row.seeds[0]
    state = "does not decode" if row.state_bytes is None else f"state {byte_size(row.state_bytes)}"
    spread = f" ({percent(min(row.seeds))} to {percent(max(row.seeds))})" if row.seeds[1:] else ""
    detail = f"{row.label}: {percent(mean)}{spread}, {state}, {amount(row.flops_total)} FLOPs"
    return Point(
        x, mean, min(row.seeds), max(row.seeds), row.label, detail,
        entry.key, row.mechanism, entry.look, entry.shape,
    )  # fmt: skip


def _methods(entries: Sequence[Entry]) -> list[Method]:
    """Mechanisms in order of their best entry."""
    grouped: dict[str, list[Entry]] = {}
    for entry in entries:
        grouped.setdefault(entry.row.mechanism, []).append(entry)
    return [Method(variants[0], tuple(variants)) for variants in grouped.values()]


def _facts(read: Comparison, last: float) -> list[tuple[str, str]]:
    """The setting in a few numbers."""
    seeds = sorted({curve.seed for row in read.rows for curve in row.curves})
    rates = sorted({rate for row in read.rows for rate in row.lrs})
    settings = (name for name in read.task if name not in ("name", "task"))
    facts = [(name, _plain(read.task[name])) for name in settings]
    facts.append(("chance", short_percent(read.chance)))
    if last:
        facts.append(("steps", f"{last:,.0f}"))
    if seeds:
        facts.append(("seeds" if len(seeds) > 1 else "seed", ", ".join(map(str, seeds))))
    if rates:
        facts.append(("learning rates", ", ".join(f"{rate:g}" for rate in rates)))
    return facts


def _making(read: Comparison) -> list[tuple[str, list[tuple[str, str]]]]:
    """Versions and hardware as titled lists."""
    groups = (("Versions", read.versions), ("Hardware", read.hardware))
    return [
        (title, [(name, _plain(value)) for name, value in group.items()])
        for title, group in groups
        if group
    ]


def _plain(value: object) -> str:
    """A value of a result file as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
