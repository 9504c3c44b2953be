"""Axes of charts: ranges with ticks, linear or logarithmic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from regard.report.units import minus, percent

FAR = 300.0
"""Positive values this many times apart are shown on a logarithmic axis."""
DENSE = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)  # multiples of powers of ten on a short logarithmic axis


@dataclass(frozen=True)
class Tick:
    """A marked value of an axis and its text."""

    value: float
    text: str


@dataclass(frozen=True)
class Axis:
    """A range of values, linear or logarithmic, with its ticks."""

    low: float
    high: float
    ticks: tuple[Tick, ...]
    log: bool = False

    def part(self, value: float) -> float:
        """How far along the axis a value lies: 0 at `low`, 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def log_axis(
    values: Sequence[float], text: Callable[[float], str], *, base: int = 10, most: int = 8
) -> Axis:
    """A logarithmic axis around positive values, at least a factor 4 long.

    base: 10 marks powers of ten (and multiples of them on a short axis), 2 marks powers of two.
    most: ticks to show at most.
    """
    low, high = min(values), max(values)
    widen = max(0.05 * math.log(high / low), (math.log(4) - math.log(high / low)) / 2)
    low, high = low / math.exp(widen), high * math.exp(widen)
    first, last = math.floor(math.log(low, base)), math.ceil(math.log(high, base))
    steps = [(1, DENSE), (1, (1.0, 2.0, 5.0))] if base == 10 else []
    steps += [(stride, (1.0,)) for stride in range(1, last - first + 2)]
    marked: list[float] = []
    for stride, multiples in steps:
        powers = [p for p in range(first, last + 1) if p % stride == 0]
        marked = [m * float(base) ** p for p in powers for m in multiples]
        marked = [value for value in marked if low <= value <= high]
        if len(marked) <= most:
            break
    return Axis(low, high, tuple(Tick(value, text(value)) for value in marked), log=True)


def linear_axis(values: Sequence[float], *, most: int = 6, whole: bool = False) -> Axis:
    """A linear axis around values, from tick to tick.

    most: steps between ticks, about. whole: only whole numbers are marked.
    """
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value has no extent
        margin = 1.0 if whole else 0.1 * abs(low) or 1.0
        low, high = low - margin * (not whole), high + margin
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    marked = [step * i for i in range(first, last + 1)]
    digits = max(0, -math.floor(math.log10(step)))
    exponent = max(abs(marked[0]), abs(marked[-1])) >= 1e6 or step < 1e-4
    ticks = tuple(Tick(v, f"{v:.2g}" if exponent else f"{v:,.{digits}f}") for v in marked)
    return Axis(marked[0], marked[-1], tuple(Tick(t.value, minus(t.text)) for t in ticks))


def fitting_axis(values: Sequence[float], *, most: int = 6, whole: bool = False) -> Axis:
    """A linear axis, or a logarithmic one where positive values lie far apart."""
    if min(values) > 0 and max(values) / min(values) > FAR:
        return log_axis(values, lambda value: f"{value:g}", most=most)
    return linear_axis(values, most=most, whole=whole)


def accuracy_axis(lowest: float) -> Axis:
    """From 0 to 100 %, or from 60, 70 or 80 % if nothing lies below."""
    if lowest < 0.6:
        low, parts = 0.0, 4
    else:
        low = min(math.floor(10 * lowest) / 10, 0.8)
        parts = round((1 - low) / (0.1 if low < 0.8 else 0.05))
    ticks = [low + i * (1 - low) / parts for i in range(parts + 1)]
    return Axis(low, 1.0, tuple(Tick(value, percent(value, 0)) for value in ticks))


def step_axis(last: float) -> Axis:
    """Training steps from 0 to the last one."""
    return Axis(0.0, max(last, 1.0), (Tick(0, "0"), Tick(max(last, 1.0), f"{max(last, 1.0):,.0f}")))
