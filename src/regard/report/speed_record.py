"""The bench results a report is made from, read from a plain dictionary and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from regard.report.reading import Shown, read_shown

SCHEMA = "regard.speed/1"
Count = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Mechanism(Shown):
    """A mechanism and its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name and options as text."""
        if not self.options:
            return self.name
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.options.items())})"


class Spread(Shown):
    """Median and quartiles."""

    median: Count
    low: Count
    high: Count


class _Cell(Shown):
    """A mechanism, and how measuring it ended."""

    mechanism: Mechanism
    family: str = ""
    status: str
    reason: str = ""


class Timed(_Cell):
    """A mechanism at one length in one mode: how it ended, and its time where it was timed."""

    mode: str
    length: int
    causal: bool = False
    seconds: Spread | None = None
    speedup: Spread | None = None
    fraction: Count | None = None


class Weighed(_Cell):
    """Peak memory of a mechanism at one length in one mode."""

    mode: str
    length: int
    peak_bytes: Count | None = None
    baseline_bytes: Count | None = None


class Decoded(_Cell):
    """One new token after many."""

    keys: int
    through: str
    state_bytes: Count | None = None
    seconds: Spread | None = None
    speedup: Spread | None = None
    tokens_per_second: Count | None = None
    bytes_per_second: Count | None = None
    fraction: Count | None = None


class Target(Shown):
    """A promise and what was reached."""

    name: str
    setting: str
    unit: str
    sense: str
    bound: Count
    reached: Count | None = None
    passed: bool | None = None
    fraction: Count | None = None
    reason: str = ""


class Efficiency(Shown):
    """From which length a mechanism wins, and where it loses."""

    mechanism: Mechanism
    what: str
    wins_from: int | None
    measured: tuple[int, ...]
    loses: tuple[int, ...]

    @property
    def text(self) -> str:
        """The length, "≤" where nothing shorter was measured, or "never"."""
        if self.wins_from is None:
            return "never"
        return f"{self.wins_from:,}" if self.loses else f"≤ {self.wins_from:,}"


class Roof(Shown):
    """Best rates seen."""

    matmul_float32: Count
    matmul_bfloat16: Count
    copy_bytes: Count
    read_bytes: Count


class Session(Shown):
    """One run of a bench command."""

    started: str
    command: str
    load: Count | None = None
    hardware: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, Any] = Field(default_factory=dict)
    roof: Roof


class Speed(Shown):
    """Everything measured in one folder."""

    setting: dict[str, Any]
    threads: int
    sessions: tuple[Session, ...] = Field(min_length=1)
    times: tuple[Timed, ...] = ()
    memory: tuple[Weighed, ...] = ()
    decode: tuple[Decoded, ...] = ()
    targets: tuple[Target, ...] = ()
    efficiency: tuple[Efficiency, ...] = ()
    notes: tuple[str, ...] = ()


def read_speed(speed: Mapping[str, Any]) -> Speed:
    """The results of a dictionary.

    Raises:
        ArgumentError: another schema, or a field that is missing or of the wrong kind.
    """
    return read_shown(Speed, speed, SCHEMA)
