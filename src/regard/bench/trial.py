"""A trial: one mechanism, one learning rate, one seed; what was asked and what came out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from regard.bench.machine import Hardware, Versions
from regard.bench.record import Record, digest
from regard.bench.spec import Spec
from regard.core.errors import ArgumentError

STEPS = 400
CONV = 3
ENOUGH = 0.99  # validation accuracy at which a task counts as solved, as in the recall paper

Share = Annotated[float, Field(ge=0, le=1)]
Status = Literal["solved", "spent", "diverged"]


class Network(Record):
    """The backbone around the mechanism, the same for all that are compared: width, heads of each
    mechanism and number of layers.

    conv: taps of the convolution before each mechanism, 0 for none; only on tokens, CONV if None.
    """

    dim: int = Field(default=64, gt=0)
    heads: int = Field(default=1, gt=0)
    layers: int = Field(default=2, gt=0)
    conv: int | None = Field(default=None, ge=0)


class Budget(Record):
    """How long a trial trains: `steps`, or `minutes` of wall time; STEPS steps if neither is given.

    batch: sequences in a step. every: steps from one validation to the next.
    """

    steps: int | None = Field(default=None, gt=0)
    minutes: float | None = Field(default=None, gt=0)
    batch: int = Field(default=128, gt=0)
    every: int = Field(default=25, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _one_of_two(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = [name for name in ("steps", "minutes") if values.get(name) is not None]
        if len(given) == 2:
            raise ArgumentError("steps, minutes", "at most one of the two", "both")
        return values if given else {**values, "steps": STEPS}


class TrialConfig(Record):
    """Everything that decides a trial's outcome on one machine."""

    task: Spec
    mechanism: Spec
    network: Network
    budget: Budget
    lr: PositiveFloat
    seed: NonNegativeInt

    @property
    def id(self) -> str:
        """A stable name: the same config has the same id on every machine."""
        return digest(self)

    @property
    def label(self) -> str:
        """What a reader calls it."""
        return f"{self.mechanism.label}, lr {self.lr:g}, seed {self.seed}"


class Point(Record):
    """A point of the learning curve: mean training loss since the last one (None: it stopped being
    a finite number), validation accuracy.
    """

    step: PositiveInt
    loss: float | None
    accuracy: Share


class Trial(Record):
    """A finished trial.

    status: "solved" (stopped at enough accuracy), "spent" (the budget ran out) or "diverged" (a
    loss that is not finite; accuracies are those of the weights at that moment). flops_per_step:
    counted in the first training step, forward and backward. state_bytes: what decoding holds per
    sequence after the task's length; None where the network does not decode.
    """

    format: Literal["regard.trial/1"] = Field(default="regard.trial/1", alias="schema")
    config: TrialConfig
    versions: Versions
    hardware: Hardware
    seed: NonNegativeInt
    parameters: NonNegativeInt
    flops_per_step: NonNegativeInt
    flops_total: NonNegativeInt
    state_bytes: NonNegativeInt | None
    curve: tuple[Point, ...]
    valid_accuracy: Share
    test_accuracy: Share
    seconds: float
    status: Status

    @property
    def steps_to_solve(self) -> int | None:
        """First measured step with enough validation accuracy, None if there was none."""
        return next((point.step for point in self.curve if point.accuracy >= ENOUGH), None)
