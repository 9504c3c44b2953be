"""What plans do to a model that can do something: the pocket language model and its needles."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.core.errors import ArgumentError
from regard.importance.retrieval import retrieval_score
from regard.plan import Plan, Step
from regard.recipes.retrieval_heads import retrieval_scores, silencing_plan, split_plan
from regard.tasks.needle import Needle

pytest.importorskip("transformers")

TASK = Needle(length=512, examples=48)
BATCH = 16


@pytest.fixture(scope="module")
def model() -> Any:
    return regard.pocket.language()[0]


@pytest.fixture(scope="module")
def scores(model: Any) -> Tensor:
    return retrieval_scores(model, itertools.islice(TASK.questions("valid", BATCH), 2))


def needle(model: Any, plan: Plan | None) -> tuple[float, float]:
    """Share of whole answers said right, and the cache's budget after the last question."""
    right = 0
    for question in TASK.questions("test", BATCH):
        context = nullcontext() if plan is None else plan.applied(model)
        with context as run, torch.no_grad():
            said = model.generate(
                question.prompt,
                attention_mask=torch.ones_like(question.prompt),
                max_new_tokens=question.answer.shape[1],
                do_sample=False,
                pad_token_id=0,
            )
        right += int((said[:, question.prompt.shape[1] :] == question.answer).all(-1).sum())
    return right / TASK.examples, 1.0 if run is None else run.report()["budget"]


def everywhere(treatment: str, **options: Any) -> Plan:
    return Plan(steps=(Step(treatment=treatment, options=options),))


def test_a_quarter_chosen_by_the_question_keeps_the_needle(model: Any) -> None:
    untouched, _ = needle(model, None)
    snapkv, held = needle(model, everywhere("snapkv", budget=0.25))
    recent, as_much = needle(model, everywhere("stream", budget=0.25))
    assert untouched >= 0.99
    assert held <= 0.25 + 0.05
    assert as_much <= 0.25 + 0.05
    assert snapkv >= 0.95 * untouched
    assert recent < 0.4


def test_retrieval_stands_on_its_heads(model: Any, scores: Tensor) -> None:
    """Without the top heads nothing is retrieved; without as many others everything is."""
    heads = scores.shape[1]
    order = [divmod(int(i), heads) for i in scores.flatten().argsort(descending=True, stable=True)]
    top = [head for head in order if scores[head] > 0.1]
    assert 2 <= len(top) <= scores.numel() // 3, "a few heads, not most of them"
    assert needle(model, silencing_plan(top))[0] <= 0.05
    others = [head for head in order if scores[head] <= 0.1]
    spread = others[:: max(1, len(others) // len(top))][: len(top)]
    assert needle(model, silencing_plan(spread))[0] >= 0.95


def test_retrieval_and_streaming_heads(model: Any, scores: Tensor) -> None:
    """Whole caches for the key heads that retrieve, a window for the others."""
    kv_heads = model.config.num_key_value_heads
    accuracy, held = needle(model, split_plan(scores, kv_heads, full=2))
    assert held <= 0.5
    assert accuracy >= 0.95


def test_score_of_a_head_that_always_points_at_what_is_said() -> None:
    prompt, needle_at = (
        torch.tensor([[5, 7, 8, 9, 4]]),
        torch.tensor([[False, True, True, True, 0]]),
    )
    said = torch.tensor([[7, 8, 9]])
    points = torch.tensor([[[1, 0], [2, 0], [3, 0]]])  # (B,T,heads): one copies, one does not
    assert retrieval_score(points, prompt, said, needle_at.bool()).tolist() == [[1.0, 0.0]]
    other = torch.tensor([[7, 7, 7]])
    repeated = torch.tensor([[[1, 1], [1, 2], [1, 3]]])
    by_set = retrieval_score(repeated, prompt, other, needle_at.bool())
    by_events = retrieval_score(repeated, prompt, other, needle_at.bool(), "events")
    assert by_set[0].tolist() == pytest.approx([1 / 3, 1 / 3])
    assert by_events[0].tolist() == pytest.approx([1.0, 1 / 3])


def test_score_without_a_needle() -> None:
    with pytest.raises(ArgumentError, match="needle"):
        retrieval_score(
            torch.zeros(1, 1, 1, dtype=torch.long),
            torch.zeros(1, 4, dtype=torch.long),
            torch.zeros(1, 1, dtype=torch.long),
            torch.zeros(1, 4, dtype=torch.bool),
        )
