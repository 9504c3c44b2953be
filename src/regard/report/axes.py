"""Axes of charts: ranges with ticks, linear or logarithmic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from regard.report.units import percent

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
