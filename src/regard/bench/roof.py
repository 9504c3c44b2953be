"""The roof: what the machine can do at most, measured in the run whose results it judges."""

from __future__ import annotations

import time

import torch
from pydantic import PositiveFloat, PositiveInt

from regard.bench.machine import cache_bytes
from regard.bench.record import Record
from regard.bench.timing import Work

SIDES = (512, 1024, 2048)  # of the square matrices whose fastest product is the roof
SIDE = 768  # of the product that is timed in turn with a mechanism
PROBE_FLOPS = 2 * SIDE**3
LEAST_BUFFER = 64 * 2**20
ROUNDS = 4


class Roof(Record):
    """Best rates seen: matrix products in FLOP/s, memory in bytes/s (a copy reads and writes).

    buffer_bytes: of each buffer copied or read; at least four times `last_cache_bytes`, where the
    system tells that.
    """

    matmul_float32: PositiveFloat
    matmul_bfloat16: PositiveFloat
    copy_bytes: PositiveFloat
    read_bytes: PositiveFloat
    buffer_bytes: PositiveInt
    last_cache_bytes: PositiveInt | None


def measure_roof() -> Roof:
    """The roof of this process with the threads it has now; takes a second or two."""
    buffer = torch.ones(buffer_bytes() // 4)
    target = torch.empty_like(buffer)
    size = buffer.numel() * buffer.element_size()
    return Roof(
        matmul_float32=max(_matmul_rate(side, torch.float32) for side in SIDES),
        matmul_bfloat16=max(_matmul_rate(side, torch.bfloat16) for side in SIDES),
        copy_bytes=2 * size / _best(lambda: target.copy_(buffer)),
        read_bytes=size / _best(buffer.sum),
        buffer_bytes=size,
        last_cache_bytes=cache_bytes(),
    )


def buffer_bytes() -> int:
    """Size of a buffer that no cache holds."""
    return max(LEAST_BUFFER, 4 * (cache_bytes() or 0))


def matmul_probe() -> Work:
    """A product of PROBE_FLOPS operations, to be timed in turn with what it judges."""
    a = torch.ones(SIDE, SIDE)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, a, out=out)


def read_probe() -> tuple[Work, int]:
    """A sum over memory that no cache holds, and the bytes it reads."""
    buffer = torch.ones(buffer_bytes() // 4)
    return buffer.sum, buffer.numel() * buffer.element_size()


def _matmul_rate(side: int, dtype: torch.dtype) -> float:
    a = torch.ones(side, side, dtype=dtype)
    return 2 * side**3 / _best(lambda: a @ a)


def _best(work: Work) -> float:
    """Least seconds of a few calls, after a warm-up."""
    work()
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
