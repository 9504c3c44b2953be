"""Exams for any language model with a tokenizer: numbers planted in text, and text itself.

    … text … The pass key is 71432. … text … The pass key is

Several facts have a name each: "The pass key of cedar is 71432." All examples have the same number
of tokens, so none is padded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.bench.exams import Interview, Score, batched, interviewed, predicted
from regard.bench.subject import Subject
from regard.core.errors import ArgumentError
from regard.plan import Plan
from regard.tasks.corpus import corpus
from regard.tasks.task import stream_seed

NAMES = ("cedar", "amber", "harbor", "violet", "copper", "meadow", "falcon", "winter")
DIGITS = 5
BYTES_PER_TOKEN = 8
"""More than tokenizers make of text on average; where it is not enough, more is read."""


@dataclass(frozen=True)
class TextFacts:
    """Numbers planted at random places in text, all of them asked. facts: 1 for a needle, up to 8.

    length: tokens of an example, questions and answers included. file: text to use in place of
    Python's documentation. later: the first question is no part of the prompt.
    """

    subject: Subject
    length: int
    facts: int
    examples: int
    seed: int
    file: str | None = None
    later: bool = False

    def __post_init__(self) -> None:
        shown = sum(len(fact) for fact in self._facts([10**DIGITS - 1] * self.facts))
        least = shown + self._asked + len(self.subject.opening)
        if self.length < least:
            raise ArgumentError("length", f"at least {least}", self.length)

    @property
    def chance(self) -> float:
        """Answering with any of the numbers shown, or a number drawn at random."""
        return 1 / self.facts if self.facts > 1 else 10.0**-DIGITS

    def describe(self) -> dict[str, Any]:
        return {
            "task": "recall" if self.facts > 1 else "needle",
            "length": self.length, "facts": self.facts, "examples": self.examples,
            "file": self.file, "later": self.later,
        }  # fmt: skip

    def score(self, model: Any, plan: Plan | None) -> Score:
        return interviewed(self.interviews(), model, plan, self.chance)

    def interviews(self) -> Iterator[Interview]:
        """The examples, drawn from the seed."""
        return (interview for interview, _ in self.drawn())

    def drawn(self) -> Iterator[tuple[Interview, Any]]:
        """The examples and the numbers (B, facts) in them."""
        source = Source(self.subject, self.file)
        for index, count in enumerate(batched(self.examples)):
            random = np.random.default_rng(stream_seed("test", self.seed, index))
            numbers = random.integers(10 ** (DIGITS - 1), 10**DIGITS, (count, self.facts))
            texts = [self._text(random, source, row) for row in numbers.tolist()]
            yield self._interview(torch.tensor(texts), numbers), numbers

    def _interview(self, text: Tensor, numbers: Any) -> Interview:
        def right(number: int, found: Tensor) -> Tensor:
            said = [self.subject.decode(row) for row in found.tolist()]
            pairs = zip(said, numbers[:, number], strict=True)
            return torch.tensor([bool(re.match(rf"\s*{wanted}(?!\d)", s)) for s, wanted in pairs])

        asks = tuple(torch.tensor([self._ask(i)] * len(text)) for i in range(self.facts))
        longest = max(len(self.subject.plain(f" {number}")) for number in numbers.flat)
        return Interview(text, asks, longest, right, self.later)

    def _text(self, random: np.random.Generator, source: Source, numbers: list[int]) -> list[int]:
        facts, opening = self._facts(numbers), self.subject.opening
        room = self.length - len(opening) - self._asked - sum(map(len, facts))
        text = source.passage(random.random(), room)
        cuts = sorted(random.integers(0, room + 1, len(facts)).tolist())
        order = random.permutation(len(facts)).tolist()
        ids, last = list(opening), 0
        for cut, which in zip(cuts, order, strict=True):
            ids += text[last:cut] + facts[which]
            last = cut
        return ids + text[last:]

    @property
    def _asked(self) -> int:
        """Tokens of all questions and answers."""
        answer = len(self.subject.plain(f" {10**DIGITS - 1}"))
        return sum(len(self._ask(i)) + answer for i in range(self.facts))

    def _facts(self, numbers: list[int]) -> list[list[int]]:
        return [
            self.subject.plain(f"{self._said(i)} {number}.\n") for i, number in enumerate(numbers)
        ]

    def _ask(self, which: int) -> list[int]:
        return self.subject.plain(self._said(which))

    def _said(self, which: int) -> str:
        name = f" of {NAMES[which]}" if self.facts > 1 else ""
        return f"\nThe pass key{name} is"


@dataclass(frozen=True)
class Passages:
    """Text of `length` tokens, whose second half is to be predicted."""

    subject: Subject
    length: int
    examples: int
    file: str | None = None

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ArgumentError("length", "at least 2", self.length)

    @property
    def chance(self) -> float:
        """Every token of the vocabulary alike."""
        return float(self.subject.model.config.get_text_config().vocab_size)

    def describe(self) -> dict[str, Any]:
        return {
            "task": "perplexity", "length": self.length, "examples": self.examples,
            "file": self.file,
        }  # fmt: skip

    def score(self, model: Any, plan: Plan | None) -> Score:
        return predicted(self.passages(), model, plan, self.chance)

    def passages(self, shift: float = 0.0) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of the passages, which are spread evenly over the text; shift: where
        the first begins, as a part of the text.
        """
        source, opening = Source(self.subject, self.file), self.subject.opening
        starts = (np.linspace(0, 1, self.examples) + shift) % (1 + shift)
        for part in np.split(starts, np.cumsum(batched(self.examples))[:-1]):
            room = self.length + 1 - len(opening)
            ids = torch.tensor([opening + source.passage(float(x), room) for x in part])
            yield ids[:, :-1], ids[:, 1:]


@dataclass(frozen=True)
class Source:
    """Held-out text in a model's tokens."""

    subject: Subject
    file: str | None

    def passage(self, start: float, length: int) -> list[int]:
        """`length` tokens of text from a place in it, 0 the beginning and 1 the last that serves.

        Raises:
            ArgumentError: the text is too short.
        """
        text = corpus("test", self.file)
        reach = BYTES_PER_TOKEN * length
        while length:
            first = int(start * max(0, len(text) - reach))
            found = text[first : first + reach].tobytes().decode(errors="ignore")
            ids = self.subject.plain(found)
            if len(ids) >= length:
                return ids[:length]
            if reach >= len(text):
                raise ArgumentError("file", f"{length} tokens of held-out text", len(ids))
            reach *= 2
        return []
