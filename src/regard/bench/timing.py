"""Timing of rivals in one process: one call of each in turn, again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from regard.bench.record import Record
from regard.core.errors import ArgumentError

Work = Callable[[], object]


class Spread(Record):
    """Median and quartiles of a number measured in several rounds."""

    median: NonNegativeFloat
    low: NonNegativeFloat
    high: NonNegativeFloat
    rounds: PositiveInt


@dataclass(frozen=True)
class Pace:
    """How long to measure: rounds until `budget` seconds are used, at least `least` and at most
    `most`; only `long` rounds where one alone takes longer than the budget.
    """

    budget: float = 1.0
    least: int = 3
    most: int = 40
    long: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.budget < float("inf")) or not 1 <= self.long <= self.least <= self.most:
            expected = "seconds > 0 and 1 <= long <= least <= most"
            raise ArgumentError("pace", expected, (self.budget, self.least, self.most))


def interleaved(
    rivals: Sequence[Work], pace: Pace, *, warm_up: Sequence[Work] | None = None
) -> list[list[float]]:
    """Seconds of each rival in each round, after a warm-up round: A B C, A B C, ...

    What disturbs the machine for a while disturbs all rivals alike, so ratios within a round hold
    where times do not. warm_up: calls that stand for the rivals in the first round.
    """
    _round(rivals if warm_up is None else warm_up)
    ends = time.perf_counter() + pace.budget
    rounds = [_round(rivals)]
    least = pace.least if time.perf_counter() < ends else pace.long
    while len(rounds) < least or (len(rounds) < pace.most and time.perf_counter() < ends):
        rounds.append(_round(rivals))
    return [list(times) for times in zip(*rounds, strict=True)]


def _round(rivals: Sequence[Work]) -> list[float]:
    times = []
    for rival in rivals:
        started = time.perf_counter()
        rival()
        times.append(time.perf_counter() - started)
    return times


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of measured values; of one value, that value."""
    several = values if len(values) > 1 else [values[0], values[0]]
    low, _, high = quantiles(several, n=4, method="inclusive")
    return Spread(median=median(values), low=low, high=high, rounds=len(values))


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Ratio of two rivals, formed round by round."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def rate(amount: PositiveFloat, seconds: Sequence[float]) -> float:
    """Amount per second in the median round."""
    return amount / median(seconds)
