"""What an evaluation is asked, and its result: plans beside the model as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from regard.bench.exams import Score
from regard.bench.machine import Hardware, Versions
from regard.bench.record import Record, digest
from regard.bench.subject import SubjectRecord
from regard.bench.timing import Spread
from regard.core.errors import ArgumentError, RegardError
from regard.plan import Plan

DENSE = "dense"
"""The row of the model as it is."""
TASKS = ("needle", "recall", "perplexity")

Task = Literal["needle", "recall", "perplexity"]


class Named(Record):
    """A plan and what it is called in tables."""

    label: str
    plan: Plan


class Inquiry(Record):
    """What is asked: every plan, at every length, on every task. examples: questions of needle and
    recall, perplexity reads an eighth as many passages. tokens: decoded for timing. seconds: of
    timing at each length. file: text to use instead of Python's documentation. later: questions
    come after the prompt, as where many share one, so that no plan can choose by them.
    """

    plans: Annotated[tuple[Named, ...], Field(min_length=1)]
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)] = TASKS
    lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1024,)
    examples: PositiveInt = 64
    seed: NonNegativeInt = 0
    tokens: PositiveInt = 32
    seconds: NonNegativeFloat = 5.0
    file: str | None = None
    later: bool = False

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        values = {
            "plan": [DENSE, *(named.label for named in self.plans)],
            "task": self.tasks,
            "length": self.lengths,
        }
        for name, found in values.items():
            if len(set(found)) < len(found):
                raise ArgumentError(name, "each one once", ", ".join(map(str, found)))
        return self


class SheetConfig(Record):
    """Everything that decides a score on one machine. plan: None is the model as it is."""

    model: str
    plan: Plan | None
    task: dict[str, Any]
    seed: NonNegativeInt

    @property
    def id(self) -> str:
        """Its name."""
        return digest(self)


class Sheet(Record):
    """A finished exam: one plan on one task at one length."""

    format: Literal["regard.sheet/1"] = Field(default="regard.sheet/1", alias="schema")
    config: SheetConfig
    score: Score
    versions: Versions
    hardware: Hardware
    seconds: float


class EvaluationRow(Record):
    """One plan, or the model as it is, at one length. budget: fraction of the dense cache's bytes
    that it holds; compression_ratio: fraction removed. plan: as in its file.
    """

    label: str
    length: PositiveInt
    plan: dict[str, Any] | None
    scores: dict[str, Score]
    at_chance: tuple[str, ...]
    cache_bytes: NonNegativeInt
    budget: float
    compression_ratio: float
    prefill_seconds: Spread
    decode_seconds: Spread
    prefill_speedup: Spread
    decode_speedup: Spread


class Evaluation(Record):
    """The result, the model as it is first at every length."""

    format: Literal["regard.evaluation/1"] = Field(default="regard.evaluation/1", alias="schema")
    subject: SubjectRecord
    tasks: dict[str, dict[str, Any]]
    lengths: tuple[int, ...]
    seed: int
    tokens: int
    rows: tuple[EvaluationRow, ...]
    notes: tuple[str, ...]
    versions: Versions
    hardware: Hardware
    seconds: float
    command: str


def named_plans(paths: list[Path]) -> tuple[Named, ...]:
    """The plans in files, called by their files' names; by their whole paths where these are equal.

    Raises:
        PlanError: a file that is no plan; it is named.
        ArgumentError: a file twice.
    """
    names = [path.stem for path in paths]
    named = []
    for path, name in zip(paths, names, strict=True):
        try:
            plan = Plan.load(path)
        except RegardError as error:
            error.add_note(f"in {path}")
            raise
        alone = names.count(name) == 1 and name != DENSE
        named.append(Named(label=name if alone else str(path), plan=plan))
    return tuple(named)
