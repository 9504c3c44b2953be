"""Tables of `regard bench`, one per verb."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from rich.table import Table

from regard.report.speed import time_span
from regard.report.units import byte_size, percent

if TYPE_CHECKING:
    from regard.bench.speed import DecodePoint, MemoryPoint, Speed, TargetPoint, TimePoint

P = TypeVar("P", "TimePoint", "MemoryPoint")

NONE = "–"


def speed_table(speed: Speed) -> Table:
    """Speed of every mechanism at its longest timed input, and its efficiency length."""
    found = {(e.mechanism.label, e.what): e for e in speed.efficiency}
    table = _table(
        "time beside scaled_dot_product_attention",
        ("mode", "faster from", "slower at", "longest", "time", "× faster", "of the roof"),
    )
    for group in _groups(speed.times):
        timed = [point for point in group if point.seconds is not None]
        first, name = group[0], group[0].mechanism.label
        if not timed:
            table.add_row(name, first.mode, first.status, *[NONE] * 5, first.reason)
            continue
        last = max(timed, key=lambda point: point.length)
        summary = found[name, "forward time" if first.mode == "forward" else "backward time"]
        slower = ", ".join(map(str, summary.loses)) or NONE
        table.add_row(
            name, first.mode, summary.text, slower, str(last.length), *_timed(last), _why(group)
        )
    return table


def memory_table(speed: Speed) -> Table:
    """Peak memory of every mechanism at its longest weighed input."""
    found = {(e.mechanism.label, e.what): e for e in speed.efficiency}
    table = _table(
        "peak extra memory beside scaled_dot_product_attention",
        ("mode", "less from", "longest", "peak", "SDPA"),
    )
    for group in _groups(speed.memory):
        weighed = [point for point in group if point.peak_bytes is not None]
        first, name = group[0], group[0].mechanism.label
        if not weighed:
            table.add_row(name, first.mode, first.status, *[NONE] * 3, first.reason)
            continue
        last = max(weighed, key=lambda point: point.length)
        summary = found[name, "forward memory" if first.mode == "forward" else "backward memory"]
        rival = last.baseline_bytes
        sizes = (byte_size(last.peak_bytes or 0), NONE if rival is None else byte_size(rival))
        table.add_row(name, first.mode, summary.text, str(last.length), *sizes, _why(group))
    return table


def decode_table(speed: Speed) -> Table:
    """One decoded token of every mechanism."""
    table = _table(
        "one new token after many",
        ("keys", "through", "state", "time", "tokens/s", "GB/s", "of reading", "× faster"),
    )
    for point in speed.decode:
        table.add_row(point.mechanism.label, *_decoded(point), point.reason)
    return table


def target_table(speed: Speed) -> Table:
    """What was promised, and what was reached."""
    table = _table("targets", ("setting", "bound", "reached", "unit", "verdict", "of the roof"))
    for point in speed.targets:
        table.add_row(
            point.name,
            point.setting,
            f"{'≥' if point.sense == 'at least' else '≤'} {point.bound:g}",
            NONE if point.reached is None else f"{point.reached:.3g}",
            point.unit,
            verdict(point),
            NONE if point.fraction is None else percent(point.fraction, 0),
            point.reason,
        )
    return table


def verdict(point: TargetPoint) -> str:
    """Passed, failed, or not measured."""
    if point.passed is None:
        return "not measured"
    return "pass" if point.passed else "FAIL"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    table.add_column("mechanism" if title != "targets" else "target", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    return table


def _groups(points: Sequence[P]) -> list[list[P]]:
    """Points of one mechanism in one mode, in the order they were measured."""
    groups: dict[tuple[str, str], list[P]] = {}
    for point in points:
        groups.setdefault((point.mechanism.label, point.mode), []).append(point)
    return list(groups.values())


def _why(group: Sequence[TimePoint] | Sequence[MemoryPoint]) -> str:
    """Why longer inputs are missing."""
    return next((point.reason for point in group if point.reason), "")


def _timed(point: TimePoint) -> tuple[str, str, str]:
    if point.seconds is None or point.speedup is None or point.fraction is None:
        return NONE, NONE, NONE
    speedup = point.speedup
    return (
        time_span(point.seconds.median),
        f"{speedup.median:.2f} ({speedup.low:.2f}–{speedup.high:.2f})",
        percent(point.fraction, 0),
    )


def _decoded(point: DecodePoint) -> tuple[str, ...]:
    if point.seconds is None or point.speedup is None or point.state_bytes is None:
        return (str(point.keys), point.through, point.status, *[NONE] * 5)
    return (
        str(point.keys),
        point.through,
        byte_size(point.state_bytes),
        time_span(point.seconds.median),
        f"{point.tokens_per_second or 0:.0f}",
        f"{(point.bytes_per_second or 0) / 1e9:.2f}",
        percent(point.fraction or 0, 0),
        f"{point.speedup.median:.2f}",
    )
