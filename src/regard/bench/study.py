"""A study: what is compared with what, as data."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from regard.bench.record import Record
from regard.bench.spec import Spec
from regard.bench.trial import Budget, Network, TrialConfig
from regard.core.errors import ArgumentError


class Study(Record):
    """Every mechanism is trained at every learning rate with every seed, all else equal."""

    task: Spec
    mechanisms: Annotated[tuple[Spec, ...], Field(min_length=1)]
    lrs: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    network: Network = Network()
    budget: Budget

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for name in ("mechanisms", "lrs", "seeds"):
            values = getattr(self, name)
            if any(value in values[:index] for index, value in enumerate(values)):
                raise ArgumentError(name, "each value once", values)
        return self

    @property
    def trials(self) -> tuple[TrialConfig, ...]:
        """The trials, mechanism by mechanism."""
        return tuple(
            TrialConfig(
                task=self.task,
                mechanism=mechanism,
                network=self.network,
                budget=self.budget,
                lr=lr,
                seed=seed,
            )
            for mechanism in self.mechanisms
            for lr in self.lrs
            for seed in self.seeds
        )
