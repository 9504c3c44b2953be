"""The sweep: every mechanism at every length against scaled_dot_product_attention, in time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from regard.bench.book import Book
from regard.bench.gate import Gate, gate
from regard.bench.growth import Known
from regard.bench.machine import memory_limited
from regard.bench.rivals import Mode, rivals, size_for
from regard.bench.spec import Spec
from regard.bench.speed import Status, TimePoint
from regard.bench.timing import Pace
from regard.bench.yardstick import Yardsticks
from regard.build import layer_options
from regard.core.catalog import card, cards
from regard.core.errors import RegardError, UnknownNameError

FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    MemoryError,
)
"""What a mechanism may raise without ending the measurement of the others: it is told instead."""


@dataclass(frozen=True)
class Plan:
    """What to sweep. cap: seconds of one call beyond which longer inputs are left out, as are those
    whose call is foreseen to be longer.
    """

    specs: tuple[Spec, ...]
    lengths: tuple[int, ...]
    modes: tuple[Mode, ...]
    pace: Pace = Pace()
    cap: float = 2.0


@dataclass(frozen=True)
class Progress:
    """Where a measurement stands: points done of how many, and what is next."""

    done: int
    total: int
    what: str = ""


Watch = Callable[[Progress], None]


def every_mechanism() -> tuple[Spec, ...]:
    """Every card with its default options."""
    return tuple(Spec(name=name) for name in cards())


def check_specs(specs: tuple[Spec, ...]) -> None:
    """Refuse unknown mechanisms and options before anything is measured.

    Raises:
        UnknownNameError: near names are suggested.
    """
    for spec in specs:
        known = layer_options(card(spec.name))
        for name in spec.options:
            if name not in known:
                raise UnknownNameError(f"option of {spec.name}", name, known)


def sweep(plan: Plan, book: Book, watch: Watch) -> None:
    """Measure every point of the plan that the book does not hold yet."""
    check_specs(plan.specs)
    held = {(p.mechanism.label, p.mode, p.length): p for p in book.speed.times}
    total, done = len(plan.specs) * len(plan.modes) * len(plan.lengths), 0
    yardsticks = Yardsticks.from_points(book.speed.times)
    for spec in plan.specs:
        for mode in plan.modes:
            line = _Line(spec, mode, plan, book, yardsticks)
            for length in sorted(plan.lengths):
                watch(Progress(done, total, f"{spec.label}, {mode}, N={length}"))
                point = held.get((spec.label, mode, length))
                if point is None:
                    point = line.measured(length)
                    book.add("times", [point])
                line.look(point)
                done += 1
    watch(Progress(done, total))


class _Line:
    """One mechanism in one mode, from short inputs to long ones."""

    def __init__(
        self, spec: Spec, mode: Mode, plan: Plan, book: Book, yardsticks: Yardsticks
    ) -> None:
        self.spec, self.plan, self.book, self.yardsticks = spec, plan, book, yardsticks
        self.mode: Mode = mode
        self.gate: Gate | None = None
        self.known = Known(
            peaks={
                point.tokens: float(point.peak_bytes)
                for point in book.speed.memory
                if (point.mechanism, point.mode) == (spec, mode) and point.peak_bytes
            }
        )

    def look(self, point: TimePoint) -> None:
        """Learn from a point whether longer inputs can be measured."""
        if point.status == "failed":
            self.known.failed = point.length
        elif point.seconds is not None:
            self.known.seconds[point.tokens] = point.seconds.median

    def measured(self, length: int) -> TimePoint:
        """The point at a length; whatever goes wrong with the mechanism becomes its status."""
        entry = card(self.spec.name)
        size = size_for(entry, length)
        blank = TimePoint(
            mechanism=self.spec,
            family=entry.family,
            status="stopped",
            reason=self.known.ends(math.prod(size), self.plan.cap),
            session=self.book.session,
            mode=self.mode,
            length=length,
            tokens=math.prod(size),
            grid=size if len(size) > 1 else None,
            causal=entry.causal and len(size) == 1,
        )
        if blank.reason:
            return blank
        with memory_limited():
            try:
                return self._timed(blank, size)
            except FAILURES as error:
                return _with_status(blank, "failed", told(error))

    def _timed(self, blank: TimePoint, size: tuple[int, ...]) -> TimePoint:
        setting = self.book.speed.setting
        if self.gate is None:
            self.gate = gate(self.spec, setting, self.mode)
        if not self.gate.passed:
            wrong = _with_status(blank, "wrong", "it differs from its own truth")
            return wrong.model_copy(update={"gate": self.gate})
        found = rivals(self.spec, size, setting)
        shape = (card(self.spec.name).kind, found.causal, len(size), self.mode)
        times = self.yardsticks.clocked(found, shape, self.plan.pace)
        return blank.model_copy(update={"status": "measured", "gate": self.gate, **times})


def told(error: Exception) -> str:
    """The first line of an error, as a reason; one not made on purpose with its type."""
    first = str(error).splitlines()[0] if str(error) else ""
    return first if isinstance(error, RegardError) else f"{type(error).__name__}: {first}"


def _with_status(point: TimePoint, status: Status, reason: str) -> TimePoint:
    return point.model_copy(update={"status": status, "reason": reason})
