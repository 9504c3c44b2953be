"""What a language model can do, measured: answers generated, answers given, text predicted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.tasks.needle import Needle
from regard.tasks.task import IGNORED, Batch, Split

ROWS = 16  # examples in a batch


class Source(Protocol):
    """Any task on tokens."""

    def batches(self, split: Split, size: int, seed: int = 0) -> Iterator[Batch]:
        """See `regard.tasks.task.Task`."""
        ...


@torch.no_grad()
def generated(model: Any, task: Needle, split: Split = "test") -> float:
    """Fraction of the task's questions whose whole answer the model generates, greedily and on its
    own, after the prompt. `model` is a causal language model of transformers.
    """
    right = asked = 0
    for question in task.questions(split, ROWS):
        text = model.generate(
            question.prompt,
            attention_mask=torch.ones_like(question.prompt),
            max_new_tokens=task.value,
            do_sample=False,
        )
        found = text[:, question.prompt.shape[1] :] == question.answer
        right, asked = right + int(found.all(1).sum()), asked + len(found)
    return right / asked


@torch.no_grad()
def answered(model: Any, task: Source, split: Split = "test") -> float:
    """Fraction of the answers of a task on which the model's first choice is right, when it reads
    the example as it stands (earlier answers included).
    """
    right = asked = 0
    for batch in task.batches(split, ROWS):
        chosen = model(input_ids=batch.inputs, use_cache=False).logits.argmax(-1)
        known = batch.targets != IGNORED
        right += int((chosen == batch.targets)[known].sum())
        asked += int(known.sum())
    return right / asked


@torch.no_grad()
def perplexity(model: Any, task: Source, split: Split = "test") -> float:
    """exp of the mean loss, in nats per answer, over all answers of a task."""
    loss, asked = 0.0, 0
    for batch in task.batches(split, ROWS):
        logits = model(input_ids=batch.inputs, use_cache=False).logits
        loss += float(F.cross_entropy(logits.mT, batch.targets, reduction="sum"))
        asked += int((batch.targets != IGNORED).sum())
    return math.exp(loss / asked)


@torch.no_grad()
def first_token_share(model: Any, inputs: Tensor) -> list[list[float]]:
    """Weight each head (layers, heads) gives the first token, averaged over the later three
    quarters of the queries; inputs: (B,N) ids. The model must hand out its attention weights.
    """
    weights = model(input_ids=inputs, use_cache=False, output_attentions=True).attentions
    late = inputs.shape[1] // 4
    return [layer[:, :, late:, 0].mean((0, 2)).tolist() for layer in weights]
