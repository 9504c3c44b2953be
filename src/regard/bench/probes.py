"""Probes: the measurements behind targets. Each gates, then times, and returns what it reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from regard.bench.clock import clocked
from regard.bench.decode import clocked as decode_clocked
from regard.bench.decode import operator_ready
from regard.bench.footprint import Job, footprint
from regard.bench.gate import Gate, gate, judged
from regard.bench.rivals import Mode, Setting, option_choices, rivals
from regard.bench.spec import Spec
from regard.bench.timing import Pace, interleaved, ratio, spread
from regard.build import create
from regard.core.catalog import card
from regard.core.errors import RegardError, UnsupportedError

MIB = 2**20
GATE_SIDE = 24
STANDARD = Setting()


class Missing(RegardError, RuntimeError):
    """What was to be timed, or its rival, is not there."""


class Wrong(UnsupportedError):
    """What was to be timed computes something else than its truth."""


@dataclass(frozen=True)
class Found:
    """What a probe reached; `more` are further fields of the target's record."""

    reached: float
    more: dict[str, Any]


class Probe(Protocol):
    """A measurement: its unit, its setting in words, and how it is made."""

    @property
    def unit(self) -> str: ...

    @property
    def setting(self) -> str: ...

    def measure(self, pace: Pace) -> Found: ...


@dataclass(frozen=True)
class Cut:
    """How many times faster than SDPA a mechanism is; inverse: how many times its time it takes."""

    spec: Spec
    length: int
    mode: Mode = "forward"
    inverse: bool = False

    @property
    def unit(self) -> str:
        return "× the time of SDPA" if self.inverse else "× faster than SDPA"

    @property
    def setting(self) -> str:
        return f"N={self.length}, {'forward + ' if self.mode == 'backward' else ''}{self.mode}"

    def measure(self, pace: Pace) -> Found:
        checked = passed(self.spec.label, gate(self.spec, STANDARD, self.mode))
        found = clocked(rivals(self.spec, (self.length,), STANDARD).works(self.mode), pace)
        speedup = found["speedup"].median
        return Found(1 / speedup if self.inverse else speedup, timed_fields(found, checked))


@dataclass(frozen=True)
class Neighbours:
    """How many times faster than SDPA over all cells a mechanism on a 2-D grid is."""

    spec: Spec
    sides: tuple[int, int]
    shape: Setting

    @property
    def unit(self) -> str:
        return "× faster than SDPA"

    @property
    def setting(self) -> str:
        h, w = self.sides
        return f"{h}×{w} cells, H{self.shape.heads} D{self.shape.head_dim}, forward"

    def measure(self, pace: Pace) -> Found:
        small = (GATE_SIDE, GATE_SIDE)
        measured = rivals(self.spec, small, self.shape)
        truth = rivals(self.spec, small, self.shape, truth=True)
        checked = passed(self.spec.label, judged(measured, truth, "forward"))
        found = clocked(rivals(self.spec, self.sides, self.shape).works("forward"), pace)
        return Found(found["speedup"].median, timed_fields(found, checked))


@dataclass(frozen=True)
class Growth:
    """Time at a long input over time at a short one."""

    spec: Spec
    short: int
    long: int

    @property
    def unit(self) -> str:
        return f"× its time at N={self.short}"

    @property
    def setting(self) -> str:
        return f"N={self.long}, forward"

    def measure(self, pace: Pace) -> Found:
        checked = passed(self.spec.label, gate(self.spec, STANDARD, "forward"))
        works = (
            rivals(self.spec, (n,), STANDARD).works("forward")[0] for n in (self.long, self.short)
        )
        long, short = interleaved(list(works), pace)
        more = {"seconds": spread(long), "baseline_seconds": spread(short), "gate": checked}
        return Found(ratio(long, short).median, more)


@dataclass(frozen=True)
class RoofShare:
    """Counted operations per second over the matrix-product rate of the same rounds."""

    spec: Spec
    length: int

    @property
    def unit(self) -> str:
        return "of the matmul roof"

    @property
    def setting(self) -> str:
        return f"N={self.length}, forward"

    def measure(self, pace: Pace) -> Found:
        checked = passed(self.spec.label, gate(self.spec, STANDARD, "forward"))
        found = clocked(rivals(self.spec, (self.length,), STANDARD).works("forward"), pace)
        return Found(found["fraction"], timed_fields(found, checked))


@dataclass(frozen=True)
class Peak:
    """Peak extra memory of a forward in a fresh process, output included."""

    spec: Spec
    length: int

    @property
    def unit(self) -> str:
        return "MiB extra at the peak"

    @property
    def setting(self) -> str:
        return f"N={self.length}, forward"

    def measure(self, pace: Pace) -> Found:
        job = Job(
            spec=self.spec,
            size=(self.length,),
            mode="forward",
            setting=STANDARD,
            threads=torch.get_num_threads(),
        )
        return Found(footprint(job).bytes / MIB, {})


@dataclass(frozen=True)
class ReadShare:
    """Bytes of state per second of one decoded token over the read bandwidth of the same rounds."""

    spec: Spec
    keys: int

    @property
    def unit(self) -> str:
        return "of the read bandwidth"

    @property
    def setting(self) -> str:
        return f"one token, {self.keys} cached keys"

    def measure(self, pace: Pace) -> Found:
        checked = passed(self.spec.label, gate(self.spec, STANDARD, "forward"))
        entry = card(self.spec.name)
        options = option_choices(entry, self.spec.options, (self.keys,), STANDARD)[0]
        layer = create(entry.name, dim=STANDARD.dim, heads=STANDARD.heads, **options)
        with torch.no_grad():
            ready = operator_ready(layer, self.keys, STANDARD)
            found = decode_clocked(ready, STANDARD, pace)
        more = {"seconds": found["seconds"], "fraction": found["fraction"], "gate": checked}
        return Found(found["fraction"], more)


def passed(what: str, found: Gate) -> Gate:
    """The gate, if it lets through.

    Raises:
        Wrong: it does not.
    """
    if not found.passed:
        raise Wrong(what, f"its relative error is {found.error}")
    return found


def timed_fields(found: dict[str, Any], checked: Gate) -> dict[str, Any]:
    """Fields of a target's record from those of a time."""
    names = ("seconds", "baseline_seconds", "fraction")
    return {**{name: found[name] for name in names}, "gate": checked}
