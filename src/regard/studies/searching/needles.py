"""The pocket model and what it is asked: facts planted in text, in batches of passages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from regard.core.passage import Passage
from regard.plan import Plan
from regard.pocket import language
from regard.searchers.answering import mean_loss
from regard.searchers.judging import By, judged
from regard.tasks.needle import Needle
from regard.tasks.task import Split

ROWS = 8
"""Questions read side by side."""


def pocket() -> Any:
    """The pocket language model, loaded afresh.

    Raises:
        UnsupportedError: transformers is missing.
    """
    return language()[0]


def questions(length: int, count: int, split: Split, seed: int) -> list[Passage]:
    """`count` questions as passages with their answers: `length` tokens are read in all, since the
    last one of an answer is only said.
    """
    rows = min(ROWS, count)
    drawn = Needle(length, examples=count).questions(split, rows, seed)
    return [question.passage() for question in islice(drawn, -(-count // rows))]


def scores(model: Any, passages: Sequence[Passage], plans: Sequence[Plan], by: By) -> list[float]:
    """How well a model predicts the answers under each plan, the more the better; prompt and answer
    are read in one forward.
    """
    found = []
    for plan in plans:
        with plan.applied(model):
            found.append(judged(model, passages, by))
    return found


def losses(model: Any, passages: Sequence[Passage], plans: Sequence[Plan]) -> list[float]:
    """Loss of the answers in nats under each plan, read token by token through the cache."""
    return [mean_loss(model, passages, plan) for plan in plans]
