"""The memory sweep: peak extra memory of every mechanism against scaled_dot_product_attention."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from regard.bench.book import Book
from regard.bench.footprint import Footprint, FootprintError, Job, footprint, fresh_process
from regard.bench.growth import Known, foreseen
from regard.bench.rivals import Mode, size_for
from regard.bench.spec import Spec
from regard.bench.speed import MemoryPoint
from regard.bench.sweep import Plan, Progress, Watch, check_specs, told
from regard.bench.yardstick import LONGEST
from regard.core.catalog import card


def sweep_memory(plan: Plan, book: Book, watch: Watch) -> None:
    """Measure the peak of every point of the plan that the book does not hold yet."""
    check_specs(plan.specs)
    held = {(p.mechanism.label, p.mode, p.length): p for p in book.speed.memory}
    total, done = len(plan.specs) * len(plan.modes) * len(plan.lengths), 0
    rivals = _Rivals()
    for spec, mode in itertools.product(plan.specs, plan.modes):
        known = Known()
        with fresh_process() as process:
            for length in sorted(plan.lengths):
                watch(Progress(done, total, f"memory of {spec.label}, {mode}, N={length}"))
                point = held.get((spec.label, mode, length))
                if point is None:
                    peaks = _Peaks(book, plan.cap, rivals, process)
                    point = peaks.point(spec, mode, length, known)
                    book.add("memory", [point])
                _learn(known, point)
                done += 1
    watch(Progress(done, total))


def _learn(known: Known, point: MemoryPoint) -> None:
    if point.status == "failed":
        known.failed = point.length
    elif point.peak_bytes and point.seconds:
        known.peaks[point.tokens] = point.peak_bytes
        known.seconds[point.tokens] = point.seconds


Shape = tuple[object, ...]
"""Which rival: kind, causal or not, dimensions of the input, mode."""


@dataclass
class _Rivals:
    """Footprints of rivals, by shape and tokens: each is weighed once."""

    found: dict[Shape, dict[int, Footprint]] = field(default_factory=dict)

    def weighed(self, job: Job) -> dict[str, object]:
        """The peak of the rival of this job, or why it is not weighed."""
        entry, tokens = card(job.spec.name), math.prod(job.size)
        shape = (entry.kind, entry.causal and len(job.size) == 1, len(job.size), job.mode)
        known = self.found.setdefault(shape, {})
        if tokens not in known:
            seconds = {n: weighed.seconds for n, weighed in known.items()}
            expected = foreseen(seconds, tokens)
            if expected is not None and expected > LONGEST:
                return {"reason": f"its rival would take about {expected:.2g} s"}
            known[tokens] = footprint(job.model_copy(update={"baseline": True}))
        return {"baseline_bytes": known[tokens].bytes}


@dataclass
class _Peaks:
    """Peaks of one mechanism in one mode, all in one process, beside those of its rivals."""

    book: Book
    cap: float
    rivals: _Rivals
    process: ProcessPoolExecutor

    def point(self, spec: Spec, mode: Mode, length: int, known: Known) -> MemoryPoint:
        """One point; whatever goes wrong with the mechanism becomes its status."""
        entry = card(spec.name)
        size = size_for(entry, length)
        tokens = math.prod(size)
        left_out = known.ends(tokens, self.cap)
        blank = MemoryPoint(
            mechanism=spec,
            family=entry.family,
            status="stopped" if left_out else "measured",
            reason=left_out,
            session=self.book.session,
            mode=mode,
            length=length,
            tokens=tokens,
        )
        if left_out:
            return blank
        job = Job(
            spec=spec,
            size=size,
            mode=mode,
            setting=self.book.speed.setting,
            threads=self.book.speed.threads,
        )
        try:
            found = footprint(job, self.process)
        except FootprintError as error:
            return blank.model_copy(update={"status": "failed", "reason": told(error)})
        update = {"peak_bytes": found.bytes, "seconds": found.seconds, **self.rivals.weighed(job)}
        return blank.model_copy(update=update)
