"""Peak memory: one call in a process that does nothing else, its high-water mark against what
inputs and parameters already took; and how long the call was.

Resident pages count everything: tensors, and what libraries set aside for themselves.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from regard.bench.record import Record
from regard.bench.rivals import Mode, Setting
from regard.bench.spec import Spec
from regard.core.errors import RegardError

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SMALL = 600  # tokens of the call that loads libraries and starts threads, before the mark is set
SMALL_SIDE = 24


class FootprintError(RegardError, RuntimeError):
    """A call whose memory could not be measured, and why."""


class Job(Record):
    """One call to be measured: the mechanism, or its rival."""

    spec: Spec
    size: tuple[int, ...]
    mode: Mode
    setting: Setting
    threads: int
    baseline: bool = False


class Footprint(NamedTuple):
    """Extra bytes at the peak of a call, and the seconds that one call took."""

    bytes: int
    seconds: float


@contextmanager
def fresh_process() -> Iterator[ProcessPoolExecutor]:
    """A process that weighs calls one after the other, and starts with the first."""
    known = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")
    if "forkserver" in known:
        context.set_forkserver_preload(["regard.bench.rivals"])
    with ProcessPoolExecutor(1, mp_context=context) as fresh:
        yield fresh


def footprint(job: Job, process: ProcessPoolExecutor | None = None) -> Footprint:
    """Extra bytes at the peak of the call, measured in a process of its own, or in that one.

    Raises:
        FootprintError: the call failed there, or the system ended the process.
    """
    if process is None:
        with fresh_process() as fresh:
            return footprint(job, fresh)
    try:
        found = process.submit(measured, job).result()
    except BrokenProcessPool as error:
        reason = "the system ended the process, most likely for want of memory"
        raise FootprintError(reason) from error
    if isinstance(found, str):
        raise FootprintError(found)
    return found


def measured(job: Job) -> Footprint | str:
    """The footprint of the call in this process, or why there is none."""
    from regard.bench.sweep import FAILURES, told

    try:
        return measured_here(job)
    except FAILURES as error:
        return told(error)


def measured_here(job: Job) -> Footprint:
    """The footprint of the call in this process, which should do nothing else."""
    import gc

    import torch

    from regard.bench.machine import memory_limited
    from regard.bench.rivals import rivals

    torch.set_num_threads(job.threads)
    small = tuple(min(side, SMALL if len(job.size) == 1 else SMALL_SIDE) for side in job.size)
    with memory_limited():
        rivals(job.spec, small, job.setting).works(job.mode)[job.baseline]()
        work = rivals(job.spec, job.size, job.setting).works(job.mode)[job.baseline]
        gc.collect()
        _trim()
        before, started = _reset(), time.perf_counter()
        kept = work()
        seconds, after = time.perf_counter() - started, _high_water()
        del kept
    return Footprint(max(after - before, 0), seconds)


def _trim() -> None:
    """Hand freed memory back to the system, so that the call cannot reuse it unseen (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _reset() -> int:
    """Lower the high-water mark to the memory in use now, where the system allows, and return it
    (otherwise the mark so far, from which a lower peak cannot be told).
    """
    if not CLEAR.exists():
        return _high_water()
    CLEAR.write_text("5")
    return _high_water()


def _high_water() -> int:
    """Bytes this process ever had resident since the mark was set."""
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
