"""The evaluation a report is made from, read from a plain dictionary and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from regard.report.reading import Shown, read_shown

SCHEMA = "regard.evaluation/1"

Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class Spread(Shown):
    """Median and quartiles over rounds."""

    median: Number
    low: Number
    high: Number
    rounds: Count


class Score(Shown):
    """An accuracy with its interval, or a perplexity."""

    kind: Literal["accuracy", "perplexity"]
    value: Number | None
    asked: Count
    low: Number | None = None
    high: Number | None = None
    chance: Number


class Row(Shown):
    """One plan at one length; the row without a plan is the untouched model."""

    label: str
    length: Count
    plan: dict[str, Any] | None
    scores: dict[str, Score]
    at_chance: tuple[str, ...] = ()
    cache_bytes: Count
    budget: Number
    compression_ratio: Number
    prefill_seconds: Spread
    decode_seconds: Spread
    prefill_speedup: Spread
    decode_speedup: Spread


class Subject(Shown):
    """The model."""

    name: str
    architecture: str
    parameters: Count
    dtype: str
    library: str
    fingerprint: str


class Evaluation(Shown):
    """A whole evaluation, the untouched model first at every length."""

    subject: Subject
    tasks: dict[str, dict[str, Any]]
    lengths: tuple[int, ...] = Field(min_length=1)
    seed: int
    tokens: int
    rows: tuple[Row, ...] = Field(min_length=1)
    notes: tuple[str, ...] = ()
    hardware: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, Any] = Field(default_factory=dict)
    seconds: Number
    command: str

    def at(self, length: int) -> list[Row]:
        """The rows of one length."""
        return [row for row in self.rows if row.length == length]


def read_evaluation(evaluation: Mapping[str, Any]) -> Evaluation:
    """The evaluation of a dictionary.

    Raises:
        ArgumentError: another schema, or a field that is missing or of the wrong kind.
    """
    return read_shown(Evaluation, evaluation, SCHEMA)
