"""Measuring targets: each once per folder of results, kept or broken, with the reason where one
cannot be measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from regard.bench.book import Book
from regard.bench.machine import memory_limited
from regard.bench.speed import TargetPoint
from regard.bench.sweep import FAILURES, Progress, Watch, told
from regard.bench.targets import Target
from regard.bench.timing import Pace


def measure_targets(targets: Sequence[Target], pace: Pace, book: Book, watch: Watch) -> None:
    """Measure every target that the book does not hold yet."""
    held = {(p.name, p.setting, p.unit) for p in book.speed.targets}
    for done, target in enumerate(targets):
        watch(Progress(done, len(targets), f"{target.name}, {target.probe.setting}"))
        if (target.name, target.probe.setting, target.probe.unit) not in held:
            book.add("targets", [_reached(target, pace, book)])
    watch(Progress(len(targets), len(targets)))


def _reached(target: Target, pace: Pace, book: Book) -> TargetPoint:
    blank = TargetPoint(
        name=target.name,
        setting=target.probe.setting,
        unit=target.probe.unit,
        sense=target.sense,
        bound=target.bound,
        session=book.session,
    )
    with memory_limited():
        try:
            found = target.probe.measure(pace)
        except FAILURES as error:
            return blank.model_copy(update={"reason": told(error)})
    passed = target.kept(found.reached)
    return blank.model_copy(update={"reached": found.reached, "passed": passed, **found.more})
