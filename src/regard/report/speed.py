"""The report of bench results: promises, speed by length, memory, decoding, and how it was made."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regard.report.axes import Axis, log_axis
from regard.report.chart import SHAPES
from regard.report.comparison import LOOKS, OTHER
from regard.report.curves import PanelFrame, path
from regard.report.labels import Box
from regard.report.page import page, write_page
from regard.report.speed_record import Decoded, Efficiency, Speed, Timed, Weighed, read_speed
from regard.report.units import NARROW_SPACE, amount, byte_size

WHATS = ("forward time", "backward time", "forward memory", "backward memory")
PLOT = Box(36, 8, 214, 112)
BEYOND = 64.0  # speed-ups above, or below one over this, are drawn at the edge


@dataclass(frozen=True)
class Line:
    """Speed-ups of one mode: the path through its medians, and its ends where it has one point."""

    mode: str
    path: str
    dots: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Panel:
    """One mechanism: its curves, and what its table rows and drawings share."""

    key: int
    label: str
    family: str
    look: str
    shape: str
    lines: tuple[Line, ...]
    times: tuple[Timed, ...]
    memory: tuple[Weighed, ...]
    efficiency: Mapping[str, Efficiency]

    @property
    def last(self) -> Timed | None:
        """Its longest timed forward (or, without one, backward)."""
        timed = [point for point in self.times if point.speedup is not None]
        return max(timed, key=lambda p: (p.mode == "forward", p.length), default=None)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why points are missing: the first reason in each mode, in time and in memory."""
        said: dict[str, str] = {}
        for kind, points in (("", self.times), (" in memory", self.memory)):
            for point in points:
                if point.reason:
                    said.setdefault(f"{point.mode}{kind}", point.reason)
        return tuple(f"{where}: {reason}" for where, reason in said.items())

    def weights(self, lengths: Sequence[int]) -> list[tuple[str, list[Weighed | None]]]:
        """Its modes, each with what was weighed at these lengths."""
        found = {(p.mode, p.length): p for p in self.memory if p.peak_bytes is not None}
        modes = dict.fromkeys(mode for mode, _ in found)
        return [(mode, [found.get((mode, length)) for length in lengths]) for mode in modes]


def speed_html(speed: Mapping[str, Any]) -> str:
    """One self-contained HTML page of results of schema "regard.speed/1".

    Raises:
        ArgumentError: another schema, or a field that is missing or of the wrong kind.
    """
    read = read_speed(speed)
    frame = _frame(read)
    panels = _panels(read, frame)
    whats = [what for what in WHATS if any(what == e.what for e in read.efficiency)]
    return page(
        "speed.html.j2",
        {
            "title": "Speed and memory of attention",
            "speed": read,
            "finding": _finding(read, panels),
            "facts": _facts(read),
            "panels": panels,
            "timed": [panel for panel in panels if panel.times],
            "unmeasured": [panel for panel in panels if panel.reasons],
            "weighed": [panel for panel in panels if panel.memory],
            "weights": sorted({p.length for p in read.memory if p.peak_bytes is not None}),
            "families": {p.family: p for p in reversed(panels)},
            "decoded": [(_look(point), point) for point in read.decode],
            "undecoded": _undecoded(read, panels),
            "whats": whats,
            "headings": [(what.capitalize(), "ascending") for what in whats],
            "frame": frame,
            "even": frame.at(frame.x.low, 1.0)[1],
            "shapes": SHAPES,
            "time_span": time_span,
        },
    )


def write_speed(speed: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the page of bench results to a file, whole or not at all.

    Raises:
        ArgumentError: as `speed_html`; or the path is not a file in an existing folder.
    """
    write_page(speed_html(speed), path)


def time_span(seconds: float) -> str:
    """Seconds to three digits: 0.0123 becomes "12.3 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            return f"{seconds / size:.3g}{NARROW_SPACE}{unit}"
    raise ValueError(seconds)


def _frame(read: Speed) -> PanelFrame:
    lengths = [point.length for point in read.times] or [256, 32768]
    found = [p.speedup.median for p in read.times if p.speedup is not None]
    return PanelFrame(
        log_axis(lengths, lambda n: f"{n:,.0f}", base=2, most=4), _ratios(found), PLOT
    )


def _ratios(found: Sequence[float]) -> Axis:
    """Speed-ups on a logarithmic axis that holds one."""
    held = [_kept(value) for value in (*found, 0.5, 2.0)]
    return log_axis(held, lambda x: f"{x:g}×" if x >= 1 else f"1/{1 / x:g}", base=2, most=5)


def _kept(value: float) -> float:
    return min(max(value, 1 / BEYOND), BEYOND)


def _look(point: Decoded) -> tuple[str, str]:
    return LOOKS.get(point.family, OTHER)


def _undecoded(read: Speed, panels: Sequence[Panel]) -> list[str]:
    """What was timed or weighed, but carries nothing from token to token."""
    decoded = {point.mechanism.label for point in read.decode}
    return [panel.label for panel in panels if panel.label not in decoded]


def _panels(read: Speed, frame: PanelFrame) -> list[Panel]:
    """One panel per mechanism, by family and name."""
    seen = {p.mechanism.label: p.family for p in (*read.times, *read.memory)}
    panels = []
    for label, family in sorted(seen.items(), key=lambda item: (item[1], item[0])):
        times = tuple(p for p in read.times if p.mechanism.label == label)
        look, shape = LOOKS.get(family, OTHER)
        modes = dict.fromkeys(point.mode for point in times)
        panels.append(
            Panel(
                key=len(panels),
                label=label,
                family=family,
                look=look,
                shape=shape,
                lines=tuple(_line(frame, mode, times) for mode in sorted(modes, reverse=True)),
                times=times,
                memory=tuple(p for p in read.memory if p.mechanism.label == label),
                efficiency={e.what: e for e in read.efficiency if e.mechanism.label == label},
            )
        )
    return panels


def _line(frame: PanelFrame, mode: str, times: Sequence[Timed]) -> Line:
    found = sorted((p.length, p.speedup.median) for p in times if p.mode == mode and p.speedup)
    places = tuple(frame.at(length, _kept(value)) for length, value in found)
    return Line(mode, path(places) if len(places) > 1 else "", places if len(places) == 1 else ())


def _finding(read: Speed, panels: Sequence[Panel]) -> str:
    """What was found, in numbers."""
    sentences = []
    for what, verb in (("forward time", "faster"), ("forward memory", "smaller")):
        found = [e for e in read.efficiency if e.what == what]
        wins = [e for e in found if e.wins_from is not None]
        if found:
            longest = max(max(e.measured) for e in found)
            sentences.append(
                f"{len(wins)} of {len(found)} mechanisms end up {verb} than "
                f"scaled_dot_product_attention in the forward, measured up to {longest:,} tokens."
            )
    judged = [t for t in read.targets if t.passed is not None]
    if judged:
        kept = sum(bool(t.passed) for t in judged)
        sentences.append(f"{kept} of {len(judged)} measured targets are reached.")
    wrong = sorted({p.mechanism.label for p in read.times if p.status == "wrong"})
    if wrong:
        sentences.append(f"Wrong, so not timed: {', '.join(wrong)}.")
    return " ".join(sentences) or "Nothing was measured against scaled_dot_product_attention."


def _facts(read: Speed) -> list[tuple[str, str]]:
    """The setting and the roof in a few numbers."""
    roof = read.sessions[-1].roof
    facts = [(name.replace("_", " "), str(value)) for name, value in read.setting.items()]
    return [
        *facts,
        ("threads", str(read.threads)),
        ("matrix products", f"{amount(roof.matmul_float32)}FLOP/s"),
        ("in bfloat16", f"{amount(roof.matmul_bfloat16)}FLOP/s"),
        ("memory copied", f"{byte_size(roof.copy_bytes)}/s"),
        ("memory read", f"{byte_size(roof.read_bytes)}/s"),
    ]
