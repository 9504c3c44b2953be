"""Growth: what a longer input would cost, told from the shorter ones, and whether to try it.

Costs are followed along the power of the length that the last two measurements show. Of a single
one nothing is foretold: the next is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from regard.bench.machine import memory_limit

STEEPEST = 3.0  # power beyond which a growth is noise between two short measurements


def foreseen(measured: Mapping[int, float], tokens: int) -> float | None:
    """Cost at `tokens` from positive costs by shorter inputs; None from fewer than two of them."""
    shorter = sorted(n for n in measured if n < tokens)[-2:]
    if len(shorter) < 2:
        return None
    first, last = shorter
    power = math.log(measured[last] / measured[first]) / math.log(last / first)
    return measured[last] * (tokens / last) ** min(max(power, 0.0), STEEPEST)


def too_long(seconds: Mapping[int, float], tokens: int, cap: float) -> str:
    """Why a call with this many tokens is left out for its time, or an empty string."""
    if not seconds:
        return ""
    last = max(seconds)
    if seconds[last] > cap:
        return f"took {seconds[last]:.2g} s at {last}, over the cap of {cap:g} s"
    expected = foreseen(seconds, tokens)
    if expected is None or expected <= cap:
        return ""
    return f"would take about {expected:.2g} s at {tokens}, over the cap of {cap:g} s"


def too_large(peaks: Mapping[int, float], tokens: int) -> str:
    """Why a call with this many tokens is left out for its memory, or an empty string."""
    limit, expected = memory_limit(), foreseen(peaks, tokens)
    if limit is None or expected is None or expected <= limit:
        return ""
    needs, there = (f"{size / 2**30:.3g} GiB" for size in (expected, limit))
    return f"would need about {needs} at {tokens}, over the {there} it may use"


@dataclass
class Known:
    """What shorter inputs of one mechanism took in one mode, by tokens, in seconds and in bytes.
    failed: the length at which it raised an error.
    """

    seconds: dict[int, float] = field(default_factory=dict)
    peaks: dict[int, float] = field(default_factory=dict)
    failed: int | None = None

    def ends(self, tokens: int, cap: float) -> str:
        """Why an input of this length is left out, or an empty string."""
        if self.failed is not None:
            return f"it failed at {self.failed}"
        return too_long(self.seconds, tokens, cap) or too_large(self.peaks, tokens)
