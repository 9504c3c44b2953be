"""What a model is asked under a plan, and how the answers are marked: facts it must find again, and
text it must predict, both through its cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from regard.bench.reading import Reading, under
from regard.bench.record import Record
from regard.plan import Plan

ROWS = 8
"""Examples read side by side."""
Z = 1.96
"""Standard deviations of a 95 % interval."""
NEAR = 0.9
"""A perplexity above this part of that of guessing is no better than guessing."""
LARGEST = 700.0
"""A mean loss above this is reported as this: its exponential still is a number."""


class Score(Record):
    """Accuracy, or perplexity, of a model on one task.

    value: fraction of the questions answered, or perplexity per token; None if the model gave no
    numbers. asked: answers, or tokens scored. low, high: 95 % interval of an accuracy (Wilson's,
    which takes answers as independent). chance: what guessing gives.
    """

    kind: Literal["accuracy", "perplexity"]
    value: float | None
    asked: PositiveInt
    right: NonNegativeInt | None = None
    low: float | None = None
    high: float | None = None
    chance: PositiveFloat

    @property
    def at_chance(self) -> bool:
        """Whether it is no better than guessing, as far as so many answers can tell."""
        if self.value is None:
            return True
        if self.kind == "perplexity":
            return self.value >= NEAR * self.chance
        return (self.low or 0.0) <= self.chance


class Exam(Protocol):
    """A task set to one model at one length."""

    @property
    def chance(self) -> float:
        """Score of guessing."""
        ...

    def describe(self) -> dict[str, Any]:
        """Name and options as plain values, for records."""
        ...

    def score(self, model: Any, plan: Plan | None) -> Score:
        """The model's score under a plan, or as it is."""
        ...


@dataclass(frozen=True, eq=False)
class Interview:
    """A text and the questions about it.

    text: (B,N). asks: the questions, each (B,n); the first ends the prompt, the others are read
    after the answer before. count: tokens of an answer. right: question number and answer (B,count)
    -> boolean (B,). later: the text alone is the prompt, and the first question is read after it.
    """

    text: Tensor
    asks: tuple[Tensor, ...]
    count: int
    right: Callable[[int, Tensor], Tensor]
    later: bool = False

    @property
    def prompt(self) -> Tensor:
        """What is read at once (B,N)."""
        return self.text if self.later else torch.cat([self.text, self.asks[0]], 1)


def interviewed(
    interviews: Iterator[Interview], model: Any, plan: Plan | None, chance: float
) -> Score:
    """Ask every question, let the model answer on its own, and count what is right. Later questions
    follow its own answers, in the same cache.
    """
    right = asked = 0
    for interview in interviews:
        unread = interview.text.to(model.device)
        with under(plan, model):
            reading = Reading(model)
            if interview.later:
                reading.read(unread)
                unread = unread[:, :0]
            for number, ask in enumerate(interview.asks):
                unread = torch.cat([unread, ask.to(model.device)], 1)
                answer = reading.answer(unread, interview.count)
                unread = answer[:, -1:]
                marks = interview.right(number, answer.cpu())
                right, asked = right + int(marks.sum()), asked + len(marks)
    low, high = wilson(right, asked)
    return Score(
        kind="accuracy", value=right / asked, asked=asked, right=right, low=low, high=high,
        chance=chance,
    )  # fmt: skip


def predicted(
    passages: Iterator[tuple[Tensor, Tensor]], model: Any, plan: Plan | None, chance: float
) -> Score:
    """Perplexity of the second half of passages: inputs and targets, each (B,N). The first half is
    the prompt; from there on every token is read by itself, through the cache.
    """
    loss, asked = 0.0, 0
    for inputs, targets in passages:
        half = max(1, inputs.shape[1] // 2)
        inputs, targets = inputs.to(model.device), targets.to(model.device)
        with under(plan, model):
            reading = Reading(model)
            logits = reading.read(inputs[:, :half])
            for step in range(half, inputs.shape[1] + 1):
                wanted = targets[:, step - 1]
                loss += float(F.cross_entropy(logits.float(), wanted, reduction="sum"))
                asked += len(targets)
                if step < inputs.shape[1]:
                    logits = reading.read(inputs[:, step : step + 1])
    mean = loss / asked
    value = math.exp(min(mean, LARGEST)) if math.isfinite(mean) else None
    return Score(kind="perplexity", value=value, asked=asked, chance=chance)


def wilson(right: int, asked: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a fraction: `right` of `asked`."""
    share, spread = right / asked, Z * Z / asked
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def batched(count: int, rows: int = ROWS) -> Sequence[int]:
    """Sizes of the batches of so many examples."""
    return [min(rows, count - start) for start in range(0, count, rows)]
