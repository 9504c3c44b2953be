"""The memory sweep: peak extra memory of every mechanism against scaled_dot_product_attention."""

from __future__ import annotations

import itertools
import math

from regard.bench.book import Book
from regard.bench.footprint import FootprintError, Job, peak_bytes
from regard.bench.rivals import Mode, size_for
from regard.bench.spec import Spec
from regard.bench.speed import MemoryPoint
from regard.bench.sweep import Plan, Progress, Watch, check_specs, told
from regard.core.catalog import card


def sweep_memory(plan: Plan, book: Book, watch: Watch) -> None:
    """Measure the peak of every point of the plan that the book does not hold yet."""
    check_specs(plan.specs)
    held = {(p.mechanism.label, p.mode, p.length) for p in book.speed.memory}
    work = list(itertools.product(plan.specs, plan.modes, sorted(plan.lengths)))
    peaks = _Peaks(book)
    for done, (spec, mode, length) in enumerate(work):
        watch(Progress(done, len(work), f"memory of {spec.label}, {mode}, N={length}"))
        if (spec.label, mode, length) not in held:
            book.add("memory", [peaks.point(spec, mode, length)])
    watch(Progress(len(work), len(work)))


class _Peaks:
    """Peaks of mechanisms and rivals; rivals on the same shape are measured once."""

    def __init__(self, book: Book) -> None:
        self.book = book
        self.rivals: dict[tuple[object, ...], int] = {}

    def point(self, spec: Spec, mode: Mode, length: int) -> MemoryPoint:
        """One point; whatever goes wrong with the mechanism becomes its status."""
        entry = card(spec.name)
        size = size_for(entry, length)
        blank = MemoryPoint(
            mechanism=spec,
            family=entry.family,
            status="measured",
            session=self.book.session,
            mode=mode,
            length=length,
            tokens=math.prod(size),
        )
        job = Job(
            spec=spec,
            size=size,
            mode=mode,
            setting=self.book.speed.setting,
            threads=self.book.speed.threads,
        )
        try:
            peak = peak_bytes(job)
        except FootprintError as error:
            return blank.model_copy(update={"status": "failed", "reason": told(error)})
        return blank.model_copy(update={"peak_bytes": peak, "baseline_bytes": self._rival(job)})

    def _rival(self, job: Job) -> int:
        entry = card(job.spec.name)
        key = (entry.kind, entry.causal and len(job.size) == 1, job.size, job.mode)
        if key not in self.rivals:
            self.rivals[key] = peak_bytes(job.model_copy(update={"baseline": True}))
        return self.rivals[key]
