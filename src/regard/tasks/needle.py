r"""Needles: facts planted in text, some of which are asked at the end.

    begin … text … k1 a1 b1 c1 … text … k2 a2 b2 c2 … text … ask k1 a1 b1 ·

A fact is a key and its value, a few symbols that stand for nothing else in the example. The
question repeats the key; the answer at the key and at every symbol of the value but the last is the
next one. One question is the needle in the haystack of the literature; several are recall of facts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.core.passage import Passage
from regard.tasks.corpus import excerpts
from regard.tasks.task import IGNORED, Batch, Kind, Split, batch_sizes, check_request, stream_seed
from regard.tasks.vocabulary import ASK, BEGIN, FIRST_SYMBOL, SIZE, SYMBOLS

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Question:
    """Prompts that end with a key, what is to be generated after them, and where it stands.

    prompt: (B,N) ids. answer: (B, value) ids. place: (B,) index in the prompt of the first symbol
    of the value; its key stands one before.
    """

    prompt: Tensor
    answer: Tensor
    place: Tensor

    def passage(self) -> Passage:
        """The questions as a passage: the answer's place is its needle; where there are several,
        the contrast of each holds the answer of another, which is then the wrong one.
        """
        first, places = self.place[:, None], torch.arange(self.prompt.shape[1])
        needle = (places >= first) & (places < first + self.answer.shape[1])
        inputs, wrong = {"input_ids": self.prompt}, self.answer[:, 0].roll(1)
        passage = Passage(inputs, self.prompt, roles={"needle": needle}, answer=self.answer)
        if len(self.prompt) == 1:
            return passage
        other = self.prompt.masked_scatter(needle, self.answer.roll(1, 0))
        return replace(passage, wrong=wrong, contrast={"input_ids": other})


@dataclass(frozen=True)
class Needle:
    """Facts in text.

    Args:
        length: tokens per example, question and answer included. facts: facts planted. value:
            symbols per value. asked: how many facts are asked, one after the other. depth: where
            the first fact asked stands, 0 the beginning and 1 the end of the text; None: anywhere,
            as the others do. file: a text file to use as noise instead of Python's documentation.
            examples: size of the valid and test sets.
    """

    length: int = 1024
    facts: int = 4
    value: int = 3
    asked: int = 1
    depth: float | None = None
    file: str | None = None
    examples: int = 256

    name: ClassVar[str] = "needle"
    kind: ClassVar[Kind] = "tokens"
    grid: ClassVar[None] = None
    channels: ClassVar[int] = 0
    vocab: ClassVar[int] = SIZE
    classes: ClassVar[int] = SIZE

    def __post_init__(self) -> None:
        if self.value < 1:
            raise ArgumentError("value", "at least 1", self.value)
        if self.facts < 1 or self.facts * (self.value + 1) > SYMBOLS:
            raise ArgumentError("facts", f"1 to {SYMBOLS // (self.value + 1)}", self.facts)
        if not 1 <= self.asked <= self.facts:
            raise ArgumentError("asked", f"1 to facts = {self.facts}", self.asked)
        if self.noise < 0:
            raise ArgumentError("length", f"at least {self.length - self.noise}", self.length)
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ArgumentError("depth", "a number in [0, 1]", self.depth)
        if self.examples < 1:
            raise ArgumentError("examples", "at least 1", self.examples)

    @property
    def noise(self) -> int:
        """Bytes of text per example."""
        return self.length - self.facts * (self.value + 1) - self.asked * (self.value + 2)

    @property
    def chance(self) -> float:
        """Answering from a fact drawn at random."""
        return 1 / (self.facts + 1)

    def batches(self, split: Split, size: int, seed: int = 0) -> Iterator[Batch]:
        for batch, _ in self._drawn(split, size, seed):
            yield batch

    def questions(self, split: Split, size: int, seed: int = 0) -> Iterator[Question]:
        """The examples of `batches` cut after the first key asked, for a model that generates.

        Raises:
            ArgumentError: an unknown split, a size below 1 or a negative seed.
        """
        key = self._key(0)
        for batch, places in self._drawn(split, size, seed):
            answer = batch.targets[:, key : key + self.value]
            yield Question(batch.inputs[:, : key + 1], answer, places[:, 0])

    def describe(self) -> dict[str, Any]:
        return {"task": self.name, **asdict(self)}

    def _drawn(self, split: Split, size: int, seed: int) -> Iterator[tuple[Batch, Tensor]]:
        check_request(split, size, seed)
        for index, count in enumerate(batch_sizes(split, size, self.examples)):
            random = np.random.default_rng(stream_seed(split, seed, index))
            text = excerpts(random, count, self.noise, split, self.file)
            facts = distinct_symbols(random, count, self.facts * (self.value + 1))
            facts = facts.reshape(count, self.facts, self.value + 1)
            cuts = random.integers(0, self.noise + 1, (count, self.facts))
            if self.depth is not None:
                cuts[:, 0] = round(self.depth * self.noise)
            yield self._assembled(text, facts, cuts)

    def _assembled(self, text: Integers, facts: Integers, cuts: Integers) -> tuple[Batch, Tensor]:
        """Batch and places (B, asked). Fact i (B, facts, value + 1) stands after cuts[:, i] bytes
        of text (B, noise); the first `asked` ones are asked, in their order.
        """
        count, width = len(text), self.value + 1
        row = np.arange(count)[:, None]
        rank = cuts.argsort(1, kind="stable").argsort(1)
        start = 1 + cuts + width * rank  # (B, facts): where each fact begins
        tokens = np.full((count, self.length + 1), IGNORED)
        targets = np.full((count, self.length), IGNORED)
        tokens[:, 0] = BEGIN
        for offset in range(width):
            tokens[row, start + offset] = facts[:, :, offset]
        for number in range(self.asked):
            key = self._key(number)
            tokens[:, key - 1] = ASK
            tokens[:, key : key + width] = facts[:, number]
            targets[:, key : key + self.value] = facts[:, number, 1:]
        tokens[tokens == IGNORED] = text.ravel()
        batch = Batch(torch.from_numpy(tokens[:, :-1]), torch.from_numpy(targets))
        return batch, torch.from_numpy(start[:, : self.asked] + 1)

    def _key(self, number: int) -> int:
        """Where the key of a question stands."""
        return self.length + 2 - (self.asked - number) * (self.value + 2)


def distinct_symbols(random: np.random.Generator, count: int, each: int) -> Integers:
    """Ids (count, each) of symbols, none twice in a row."""
    return FIRST_SYMBOL + random.random((count, SYMBOLS)).argsort(1)[:, :each]
