"""Efficiency lengths: the input length from which a mechanism beats scaled_dot_product_attention
(the measure of CAB, 2210.07661), and the lengths at which it loses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from regard.bench.spec import Spec
from regard.bench.speed import Efficiency, MemoryPoint, TimePoint

What = Literal["forward time", "backward time", "forward memory", "backward memory"]


def efficiency(spec: Spec, what: What, wins: Mapping[int, bool]) -> Efficiency:
    """From whether it wins, by measured length (at least one)."""
    lengths = sorted(wins)
    loses = tuple(length for length in lengths if not wins[length])
    later = [length for length in lengths if not loses or length > loses[-1]]
    return Efficiency(
        mechanism=spec,
        what=what,
        wins_from=later[0] if later else None,
        measured=tuple(lengths),
        loses=loses,
    )


def efficiencies(
    times: Iterable[TimePoint], memory: Iterable[MemoryPoint]
) -> tuple[Efficiency, ...]:
    """Efficiency of every mechanism in everything measured of it.

    It wins in time where even the lower quartile of its speed-ups exceeds one, in memory where its
    peak lies below the rival's.
    """
    found: dict[tuple[str, What], tuple[Spec, dict[int, bool]]] = {}
    for point in times:
        if point.speedup is not None:
            what: What = "forward time" if point.mode == "forward" else "backward time"
            _, wins = found.setdefault((point.mechanism.label, what), (point.mechanism, {}))
            wins[point.length] = point.speedup.low > 1
    for point in memory:
        if point.peak_bytes is not None and point.baseline_bytes is not None:
            what = "forward memory" if point.mode == "forward" else "backward memory"
            _, wins = found.setdefault((point.mechanism.label, what), (point.mechanism, {}))
            wins[point.length] = point.peak_bytes < point.baseline_bytes
    return tuple(efficiency(spec, what, wins) for (_, what), (spec, wins) in found.items())
