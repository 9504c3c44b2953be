"""Yardsticks: where one call of the rival is long, it is timed once for all that meet it there.

Mechanism and rival are then each measured in matrix products timed in their own rounds, and the
speed-up is the ratio of the two: what slows the whole machine down for a while cancels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from regard.bench.clock import clocked, clocked_alone, in_products
from regard.bench.growth import foreseen
from regard.bench.rivals import Mode, Rivals
from regard.bench.roof import matmul_probe
from regard.bench.speed import TimePoint
from regard.bench.timing import Pace, Spread, Work, interleaved, spread
from regard.core.card import Kind
from regard.core.catalog import cards

LONG = 0.25  # seconds of a call from which a rival is timed once
LONGEST = 20.0  # seconds of a call from which it is not timed at all
_ONCE = Pace(budget=1.0, least=2, most=3)

Shape = tuple[Kind, bool, int, Mode]
"""Which rival: of operators or layers, causal or not, dimensions of the input, and the mode."""


@dataclass(frozen=True)
class Yardstick:
    """A rival that was timed once; cost: its time in matrix products."""

    seconds: Spread
    cost: float


@dataclass
class Yardsticks:
    """The rivals of a run: how long each shape took, and those that stand for later ones."""

    seconds: dict[Shape, dict[int, float]] = field(default_factory=dict)
    kept: dict[tuple[Shape, int], Yardstick] = field(default_factory=dict)

    @classmethod
    def from_points(cls, points: Iterable[TimePoint]) -> Yardsticks:
        """What earlier runs of the same command tell of how long the rivals take."""
        found = cls()
        for point in points:
            entry = cards().get(point.mechanism.name)
            if point.baseline_seconds is not None and entry is not None:
                sides = 1 if point.grid is None else len(point.grid)
                shape = (entry.kind, point.causal, sides, point.mode)
                known = found.seconds.setdefault(shape, {})
                known[point.tokens] = point.baseline_seconds.median
        return found

    def clocked(self, rivals: Rivals, shape: Shape, pace: Pace) -> dict[str, Any]:
        """Times of a mechanism; its rival is timed in turn where that is short."""
        own, rival = rivals.works(shape[3])
        known, tokens = self.seconds.setdefault(shape, {}), rivals.tokens
        expected = foreseen(known, tokens) or 0.0
        if (shape, tokens) not in self.kept and expected <= LONG:
            found = clocked((own, rival), pace)
            known[tokens] = found["baseline_seconds"].median
            return found
        found, costs = clocked_alone(own, pace)
        if expected > LONGEST:
            told = f"without a ratio: the rival would take about {expected:.2g} s"
            return {**found, "reason": told}
        if (shape, tokens) not in self.kept:
            self.kept[shape, tokens] = _timed_once(rival)
            known[tokens] = self.kept[shape, tokens].seconds.median
        yardstick = self.kept[shape, tokens]
        return {
            **found,
            "baseline_seconds": yardstick.seconds,
            "speedup": spread([yardstick.cost / cost for cost in costs]),
        }


def _timed_once(rival: Work) -> Yardstick:
    probe = matmul_probe()
    seconds, products = interleaved([rival, probe], _ONCE, warm_up=[lambda: None, probe])
    return Yardstick(spread(seconds), median(in_products(seconds, products)))
