"""Results of `regard bench`: what was measured, where it wins and where it loses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from regard.bench.gate import Gate
from regard.bench.machine import Hardware, Versions
from regard.bench.record import Record
from regard.bench.rivals import Mode, Setting
from regard.bench.roof import Roof
from regard.bench.spec import Spec
from regard.bench.timing import Spread

Status = Literal["measured", "wrong", "failed", "stopped"]


class Session(Record):
    """One run of a bench command: when, on what, and under which roof. Points name theirs.

    load: processes that wanted to run in the minute before it, on average; None where unknown.
    """

    started: str
    command: str
    load: NonNegativeFloat | None
    hardware: Hardware
    versions: Versions
    roof: Roof


class Outcome(Record):
    """What every measurement says. status: "measured"; "wrong" (the gate caught it, so it was not
    timed), "failed" (it raised an error) or "stopped" (left out, because by what shorter inputs
    took it would be too long or too large), each with its reason. session: index of the run that
    made it.
    """

    mechanism: Spec
    family: str
    status: Status
    reason: str = ""
    session: NonNegativeInt


class TimePoint(Outcome):
    """Time of one mechanism at one length against scaled_dot_product_attention.

    length: asked for; tokens: used, on a grid of sides `grid`. speedup: time of the rival / time of
    the mechanism, round by round. flops: counted in one call. fraction: flops per second over the
    matrix-product rate measured in the same rounds; the rival's likewise.
    """

    mode: Mode
    length: PositiveInt
    tokens: PositiveInt
    grid: tuple[PositiveInt, ...] | None = None
    causal: bool
    gate: Gate | None = None
    seconds: Spread | None = None
    baseline_seconds: Spread | None = None
    speedup: Spread | None = None
    flops: NonNegativeInt | None = None
    fraction: NonNegativeFloat | None = None
    baseline_fraction: NonNegativeFloat | None = None


class MemoryPoint(Outcome):
    """Peak extra memory of one call in its own process, beyond inputs and parameters, outputs (and
    gradients) included; the rival's likewise. seconds: what that one call took.
    """

    mode: Mode
    length: PositiveInt
    tokens: PositiveInt
    peak_bytes: NonNegativeInt | None = None
    baseline_bytes: NonNegativeInt | None = None
    seconds: NonNegativeFloat | None = None


class DecodePoint(Outcome):
    """One new token after many.

    keys: tokens seen before it; fewer than asked for where a layer took too long to read them.
    through: the "operator" on its cached state, or the whole "step" of a layer. state_bytes: what
    it read. bytes_per_second: state read per second. fraction: of the read bandwidth measured in
    the same rounds. speedup: against one query of scaled_dot_product_attention over all keys.
    """

    asked: PositiveInt
    keys: PositiveInt
    state: Literal["keys", "constant"]
    through: Literal["operator", "step"]
    state_bytes: NonNegativeInt | None = None
    seconds: Spread | None = None
    speedup: Spread | None = None
    tokens_per_second: PositiveFloat | None = None
    bytes_per_second: NonNegativeFloat | None = None
    fraction: NonNegativeFloat | None = None


class TargetPoint(Record):
    """One promise of the house: what was to be reached, and what was. reached is None, and reason
    says why, where nothing could be measured.
    """

    name: str
    setting: str
    unit: str
    sense: Literal["at least", "at most"]
    bound: NonNegativeFloat
    reached: NonNegativeFloat | None = None
    passed: bool | None = None
    fraction: NonNegativeFloat | None = None
    seconds: Spread | None = None
    baseline_seconds: Spread | None = None
    gate: Gate | None = None
    reason: str = ""
    session: NonNegativeInt


class Efficiency(Record):
    """From which length a mechanism beats the rival, in time or in memory.

    wins_from: smallest measured length from which it wins at every longer measured one; None if it
    loses at the longest. loses: measured lengths at which it does not win. Where nothing is lost,
    the true length may lie below the shortest measured.
    """

    mechanism: Spec
    what: Literal["forward time", "backward time", "forward memory", "backward memory"]
    wins_from: PositiveInt | None
    measured: tuple[PositiveInt, ...]
    loses: tuple[PositiveInt, ...]

    @property
    def text(self) -> str:
        """The efficiency length in a few characters."""
        if self.wins_from is None:
            return "never"
        return f"{'≤ ' if not self.loses else ''}{self.wins_from}"


class Speed(Record):
    """Everything measured in one folder of results."""

    format: Literal["regard.speed/1"] = Field(default="regard.speed/1", alias="schema")
    setting: Setting
    threads: PositiveInt
    sessions: tuple[Session, ...] = ()
    times: tuple[TimePoint, ...] = ()
    memory: tuple[MemoryPoint, ...] = ()
    decode: tuple[DecodePoint, ...] = ()
    targets: tuple[TargetPoint, ...] = ()
    efficiency: tuple[Efficiency, ...] = ()
    notes: tuple[str, ...] = ()
