"""Questions as passages: a fact planted in text, asked at its end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from regard.bench.subject import Subject
from regard.bench.text_exams import TextFacts
from regard.core.errors import UnsupportedError
from regard.core.passage import Passage
from regard.tasks.needle import Needle, Question

NAME = "needle"
"""What stands in the place of a file."""
ROWS = 8


def questions(subject: Subject, examples: int, length: int) -> list[Passage]:
    """`examples` questions of that many tokens, side by side in twos and more where there are so
    many, so that each can be contrasted with another.

    Raises:
        ArgumentError: a length in which no question has room.
        UnsupportedError: a tokenizer that writes numbers otherwise inside a text.
    """
    return [
        replace(passage, words=[subject.words(ids) for ids in question.prompt.tolist()])
        for question in _drawn(subject, examples, length)
        for passage in (question.passage(),)
    ]


def _drawn(subject: Subject, examples: int, length: int) -> Iterator[Question]:
    if subject.symbols:
        task = Needle(length, examples=examples)
        yield from task.questions("valid", min(ROWS, examples))
        return
    for interview, numbers in TextFacts(subject, length, 1, examples, 0).drawn():
        said = [subject.plain(f" {number}") for number in numbers[:, 0].tolist()]
        shortest = min(map(len, said))
        answer = torch.tensor([ids[:shortest] for ids in said])
        prompts = interview.prompt.tolist()
        place = [_place(ids, own[:shortest]) for ids, own in zip(prompts, said, strict=True)]
        yield Question(interview.prompt, answer, torch.tensor(place))


def _place(ids: list[int], answer: list[int]) -> int:
    """Where an answer stands in a prompt."""
    for start in range(len(ids) - len(answer) + 1):
        if ids[start : start + len(answer)] == answer:
            return start
    raise UnsupportedError("needle", "this tokenizer writes a number otherwise inside a text")
