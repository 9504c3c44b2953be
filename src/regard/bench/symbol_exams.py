"""The exam of the pocket vocabulary: facts made of symbols, planted in bytes of text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from regard.bench.exams import ROWS, Interview, Score, interviewed
from regard.plan import Plan
from regard.tasks.needle import Needle
from regard.tasks.task import IGNORED, Batch


@dataclass(frozen=True)
class SymbolFacts:
    """Facts in text, some of which are asked one after the other; see regard.tasks.needle. later:
    the first question is no part of the prompt.
    """

    task: Needle
    seed: int
    later: bool = False

    @property
    def chance(self) -> float:
        return self.task.chance

    def describe(self) -> dict[str, Any]:
        return {**self.task.describe(), "later": self.later}

    def score(self, model: Any, plan: Plan | None) -> Score:
        return interviewed(self.interviews(), model, plan, self.chance)

    def interviews(self) -> Iterator[Interview]:
        """The test examples, cut where the first key is asked."""
        for batch in self.task.batches("test", ROWS, self.seed):
            yield _cut(batch, self.task.value, self.later)


def _cut(batch: Batch, value: int, later: bool) -> Interview:
    """An example as an interview: a question is two tokens, the one that asks and the key."""
    known = (batch.targets[0] != IGNORED).nonzero().view(-1, value)  # (asked, value)
    keys = known[:, 0].tolist()
    answers = [batch.targets[:, places] for places in known]
    return Interview(
        text=batch.inputs[:, : keys[0] - 1],
        asks=tuple(batch.inputs[:, key - 1 : key + 1] for key in keys),
        count=value,
        right=lambda number, found: (found == answers[number]).all(1),
        later=later,
    )
