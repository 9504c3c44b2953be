"""What a fit is asked, what it keeps as it goes, and its result."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from regard.bench.evaluation import Evaluation, Task
from regard.bench.record import Record, digest, read_record, write_json
from regard.core.errors import ArgumentError
from regard.searchers.rules import SHARES, RuleName, Unit, ladder

Fraction = Annotated[float, Field(gt=0, le=1)]


class FitConfig(Record):
    """What is asked. budget: part of the untouched model's cost, in `unit`. lengths: tokens of the
    prompts that the budget must hold at. examples: that losses are measured on; exams: questions
    that plans are evaluated on. rounds: of refinement in company. rule: which tokens a key head
    keeps. shares: parts of the cache that a key head may keep. file: text to use instead of
    Python's documentation. later: questions come after the prompt, so that no rule can choose by
    them.
    """

    budget: Fraction = 0.25
    unit: Unit = "bytes"
    rule: RuleName = "spans"
    task: Task = "needle"
    lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1024,)
    examples: PositiveInt = 48
    exams: PositiveInt = 96
    seed: NonNegativeInt = 0
    rounds: NonNegativeInt = 3
    sinks: NonNegativeInt = 4
    shares: tuple[Fraction, ...] = SHARES
    seconds: NonNegativeFloat = 3.0
    tokens: PositiveInt = 16
    file: str | None = None
    later: bool = False

    @model_validator(mode="after")
    def _can_be_rules(self) -> Self:
        ladder(self.rule, self.shares, self.sinks)
        if len(set(self.lengths)) < len(self.lengths):
            raise ArgumentError("length", "each one once", self.lengths)
        return self


class RisesConfig(Record):
    """Everything that decides measured losses on one machine."""

    model: str
    tasks: tuple[dict[str, Any], ...]
    examples: PositiveInt
    seed: NonNegativeInt

    @property
    def id(self) -> str:
        """Its name."""
        return digest(self)


class Losses(Record):
    """Losses by key, as a search measures them."""

    format: Literal["regard.losses/2"] = Field(default="regard.losses/2", alias="schema")
    config: RisesConfig
    losses: dict[str, float]


class Ledger(MutableMapping[str, float]):
    """Losses that are kept in a file as they are measured, so that a search goes on where it was
    left.

    Raises:
        ArgumentError: the file holds something else, or cannot be written; it is named.
    """

    def __init__(self, folder: Path, config: RisesConfig) -> None:
        self.path, self.config = folder / f"{config.id}.json", config
        found = read_record(self.path, Losses).losses if self.path.exists() else {}
        self.losses = dict(found)

    def __getitem__(self, key: str) -> float:
        return self.losses[key]

    def __setitem__(self, key: str, value: float) -> None:
        self.losses[key] = value
        known = dict(sorted(self.losses.items()))  # whoever measured them, in whatever order
        write_json(self.path, Losses(config=self.config, losses=known))

    def __delitem__(self, key: str) -> None:
        del self.losses[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.losses)

    def __len__(self) -> int:
        return len(self.losses)


class Assigned(Record):
    """What one key head got. rises: of the loss, under every rule alone, from the cheapest to none.
    metrics: what its query heads do, the largest of them.
    """

    layer: NonNegativeInt
    kv_head: NonNegativeInt
    rule: str
    share: Fraction
    rises: tuple[float, ...]
    metrics: dict[str, float]


class Fit(Record):
    """The result. predicted: rise of the loss in nats per answer, by the rises alone; measured: of
    the plan itself, on the same examples. cost: of the plan, in parts of the untouched model's.
    evaluation: of the plans found, beside others of the same cost.
    """

    format: Literal["regard.fit/1"] = Field(default="regard.fit/1", alias="schema")
    config: FitConfig
    plan: dict[str, Any]
    groups: tuple[Assigned, ...]
    untouched: float
    predicted: float
    measured: float | None
    cost: float
    evaluation: Evaluation
    notes: tuple[str, ...]
    seconds: float
