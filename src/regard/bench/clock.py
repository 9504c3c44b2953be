"""The clock: times of a mechanism, with counted operations and a matrix product as their roof."""

from __future__ import annotations

from typing import Any

from regard.bench.roof import PROBE_FLOPS, matmul_probe
from regard.bench.timing import Pace, Work, interleaved, rate, ratio, spread
from regard.core.count import count_flops


def clocked(works: tuple[Work, Work], pace: Pace) -> dict[str, Any]:
    """Times of a mechanism and its rival, with a matrix product timed in turn as their roof."""
    flops: list[int] = []
    probe = matmul_probe()
    counting = [*(_counted(work, flops) for work in works), probe]
    own, baseline, products = interleaved([*works, probe], pace, warm_up=counting)
    return {
        **_timed(own, products, flops[0]),
        "baseline_seconds": spread(baseline),
        "speedup": ratio(baseline, own),
        "baseline_fraction": _timed(baseline, products, flops[1])["fraction"],
    }


def clocked_alone(work: Work, pace: Pace) -> tuple[dict[str, Any], list[float]]:
    """Times of a mechanism, and round by round in units of the matrix product timed in turn."""
    flops: list[int] = []
    probe = matmul_probe()
    own, products = interleaved([work, probe], pace, warm_up=[_counted(work, flops), probe])
    return _timed(own, products, flops[0]), in_products(own, products)


def in_products(seconds: list[float], products: list[float]) -> list[float]:
    """Seconds in units of the matrix product of the same round."""
    return [own / product for own, product in zip(seconds, products, strict=True)]


def _timed(seconds: list[float], products: list[float], flops: int) -> dict[str, Any]:
    share = rate(flops, seconds) / rate(PROBE_FLOPS, products)
    return {"seconds": spread(seconds), "flops": flops, "fraction": share}


def _counted(work: Work, flops: list[int]) -> Work:
    """A call that also appends its operations to a list."""

    def counting() -> None:
        with count_flops() as counted:
            work()
        flops.append(counted.flops)

    return counting
