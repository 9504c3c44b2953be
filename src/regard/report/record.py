"""The comparison a report is made from, read from a plain dictionary and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from regard.report.reading import Shown, read_shown

SCHEMA = "regard.comparison/1"
SOLVED = 0.99


def _finite(value: float | None) -> float | None:
    """NaN and infinity mean the same as nothing: there is no such number."""
    return value if value is not None and math.isfinite(value) else None


Number = Annotated[float | None, AfterValidator(_finite)]
Count = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Citation(Shown):
    """Where a mechanism comes from."""

    title: str
    arxiv: str | None = None
    year: int | None = None
    url: str | None = None

    @property
    def link(self) -> str | None:
        """The address, if it is one of the web: nothing else may become a link."""
        return self.url if self.url and self.url.startswith(("https://", "http://")) else None


class CurvePoint(Shown):
    """One measurement during training; a loss that is no number means divergence."""

    step: Count
    loss: Number
    accuracy: Number


class Curve(Shown):
    """The training run of one seed."""

    seed: int
    points: tuple[CurvePoint, ...]

    @property
    def diverged(self) -> bool:
        """Whether the loss stopped being a number."""
        return any(point.loss is None for point in self.points)

    @property
    def measured(self) -> list[tuple[float, float]]:
        """(step, accuracy) in order of steps, up to the divergence if there is one."""
        points = []
        for point in sorted(self.points, key=lambda point: point.step):
            if point.accuracy is not None:
                points.append((point.step, point.accuracy))
            if point.loss is None:
                break
        return points


class Row(Shown):
    """One mechanism with its options, trained at its best learning rate with every seed.

    accuracy_mean, accuracy_std, accuracies: test accuracy over seeds. lrs: validation accuracy by
    learning rate. state_bytes: of one sequence after the task's length, None if the mechanism does
    not decode. steps_to_99: until the last seed had 99 % on validation data.
    """

    label: str
    mechanism: str
    options: dict[str, Any] = Field(default_factory=dict)
    family: str
    citations: tuple[Citation, ...] = ()
    summary: str = ""
    lr: Number = None
    lrs: dict[float, Number] = Field(default_factory=dict)
    accuracy_mean: Number
    accuracy_std: Number = None
    accuracies: tuple[Number, ...] = ()
    parameters: Annotated[int, Field(ge=0)]
    state_bytes: Annotated[int, Field(ge=0)] | None
    flops_total: Count
    flops_per_step: Count
    steps_to_99: Number = None
    diverged: Annotated[int, Field(ge=0)] = 0
    curves: tuple[Curve, ...] = ()

    @property
    def seeds(self) -> list[float]:
        """Accuracies of the seeds that gave one; the mean alone if none is listed."""
        found = [value for value in self.accuracies if value is not None]
        return found or ([] if self.accuracy_mean is None else [self.accuracy_mean])

    @property
    def broken(self) -> int:
        """Seeds whose training diverged, as the row says or its curves show."""
        return max(self.diverged, sum(curve.diverged for curve in self.curves))

    @property
    def solved(self) -> bool:
        """Whether the mean over seeds reaches 99 %, or every seed did on validation data, where
        training stops: then chance decides on which side of it the test falls.
        """
        mean = self.accuracy_mean
        return mean is not None and (mean >= SOLVED or self.steps_to_99 is not None)


class Comparison(Shown):
    """A whole comparison, best row first."""

    task: dict[str, Any]
    chance: Annotated[float, Field(ge=0, le=1)]
    rows: tuple[Row, ...] = Field(min_length=1)
    hardware: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, Any] = Field(default_factory=dict)
    seconds: Count
    command: str
    notes: tuple[str, ...] = ()

    @property
    def task_name(self) -> str:
        """The task's name."""
        return str(self.task.get("name", "the task"))


def read_comparison(comparison: Mapping[str, Any]) -> Comparison:
    """The comparison of a dictionary, rows sorted: most accurate first, then smallest state.

    Raises:
        ArgumentError: another schema, or a field that is missing or of the wrong kind.
    """
    read = read_shown(Comparison, comparison, SCHEMA)
    rows = sorted(read.rows, key=lambda row: (-(row.accuracy_mean or 0), row.state_bytes or 1e30))
    return read.model_copy(update={"rows": tuple(rows)})
