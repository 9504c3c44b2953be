"""What a search learns from: examples like those of an exam, drawn apart from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from regard.bench.exams import ROWS, Exam
from regard.bench.symbol_exams import SymbolFacts
from regard.bench.text_exams import Passages, TextFacts
from regard.core.errors import UnsupportedError
from regard.core.passage import Passage
from regard.tasks.task import IGNORED, Batch

LONGEST = 48
"""Tokens of text that are predicted after a prompt: each is read by itself."""
APART = 7919
"""Added to the seed of an exam, so that no example of a search is one of its own."""


def lessons(exam: Exam, count: int, device: torch.device | str = "cpu") -> tuple[Passage, ...]:
    """At least `count` examples of an exam's kind as passages with answers, in batches: the prompt
    ends where that of the exam does, what follows is scored where it is an answer.

    Raises:
        UnsupportedError: an exam of another kind.
    """
    if isinstance(exam, SymbolFacts):
        task = replace(exam.task, examples=count)
        batches = task.batches("valid", ROWS, exam.seed + APART)
        found = [_symbols(batch, exam.later) for batch in batches]
    elif isinstance(exam, TextFacts):
        found = list(_texts(replace(exam, examples=count, seed=exam.seed + APART)))
    elif isinstance(exam, Passages):
        found = [_text(*pair) for pair in replace(exam, examples=count).passages(0.5 / count)]
    else:
        raise UnsupportedError("lessons", f"{type(exam).__name__} is no exam of the library")
    return tuple(_on(passage, device) for passage in found)


def _symbols(batch: Batch, later: bool) -> Passage:
    """The prompt ends with the key that is asked first, or before the question."""
    key = int((batch.targets[0] != IGNORED).nonzero()[0])
    end = key - 1 if later else key + 1
    ahead = torch.cat([batch.inputs[:, end:], batch.targets[:, -1:]], 1)
    return _passage(batch.inputs[:, :end], ahead, batch.targets[:, end - 1 :] != IGNORED)


def _texts(exam: TextFacts) -> Iterator[Passage]:
    """Facts in text, the first of which is asked."""
    for interview, numbers in exam.drawn():
        said = [exam.subject.plain(f" {number}") for number in numbers[:, 0].tolist()]
        longest = max(map(len, said))
        answer = torch.tensor([ids + [0] * (longest - len(ids)) for ids in said])
        scored = torch.tensor([[i < len(ids) for i in range(longest)] for ids in said])
        if interview.later:
            ask = interview.asks[0]
            answer = torch.cat([ask, answer], 1)
            scored = torch.cat([torch.zeros_like(ask, dtype=torch.bool), scored], 1)
        yield _passage(interview.prompt, answer, scored)


def _text(inputs: Tensor, targets: Tensor) -> Passage:
    half = max(1, inputs.shape[1] // 2)
    rest = targets[:, half - 1 : half - 1 + LONGEST]
    return _passage(inputs[:, :half], rest, torch.ones_like(rest, dtype=torch.bool))


def _passage(prompt: Tensor, answer: Tensor, scored: Tensor) -> Passage:
    return Passage({"input_ids": prompt}, tokens=prompt, answer=answer, scored=scored)


def _on(passage: Passage, device: torch.device | str) -> Passage:
    moved = {name: x.to(device) for name, x in passage.inputs.items()}
    assert passage.tokens is not None
    assert passage.answer is not None
    assert passage.scored is not None
    return replace(
        passage,
        inputs=moved,
        tokens=passage.tokens.to(device),
        answer=passage.answer.to(device),
        scored=passage.scored.to(device),
    )
