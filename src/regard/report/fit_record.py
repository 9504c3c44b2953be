"""The fit a report is made from, read from a plain dictionary and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from regard.report.evaluation_record import Count, Evaluation, Number
from regard.report.reading import Shown, read_shown

SCHEMA = "regard.fit/1"
Share = Annotated[float, Field(gt=0, le=1)]


class Settings(Shown):
    """What was asked. shares: that a key head may keep, rising."""

    budget: Share
    unit: str
    rule: str
    task: str
    lengths: tuple[Count, ...] = Field(min_length=1)
    examples: Count
    exams: Count
    seed: int
    rounds: Count
    sinks: Count
    shares: tuple[Share, ...] = Field(min_length=1)
    file: str | None = None
    later: bool = False


class KeyHead(Shown):
    """What one key head got. rises: of the loss at every share, alone. metrics: of its query heads,
    the largest.
    """

    layer: Count
    kv_head: Count
    rule: str
    share: Share
    rises: tuple[Number, ...]
    metrics: dict[str, Number] = Field(default_factory=dict)


class Fit(Shown):
    """A whole fit; losses in nats per answer."""

    config: Settings
    plan: dict[str, Any]
    groups: tuple[KeyHead, ...] = Field(min_length=1)
    untouched: Number
    predicted: Number
    measured: Number | None
    cost: Number
    evaluation: Evaluation
    notes: tuple[str, ...] = ()
    seconds: Number

    @model_validator(mode="after")
    def _a_rise_per_share(self) -> Self:
        if any(len(head.rises) != len(self.config.shares) for head in self.groups):
            raise ValueError("every key head has as many rises as there are shares")
        return self


def read_fit(fit: Mapping[str, Any]) -> Fit:
    """The fit of a dictionary.

    Raises:
        ArgumentError: another schema, or a field that is missing or of the wrong kind.
    """
    return read_shown(Fit, fit, SCHEMA)
