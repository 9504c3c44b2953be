"""Text: predict every byte from those before it, on what every Python carries or a user's file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from regard.core.errors import ArgumentError
from regard.tasks.corpus import passages
from regard.tasks.task import Batch, Kind, Split, batch_sizes, check_request, stream_seed
from regard.tasks.vocabulary import BEGIN, BYTES, SIZE


@dataclass(frozen=True)
class Text:
    """Passages of `length` bytes, each after the token that begins a sequence; the answer at every
    token is the next byte. exp of the mean loss is the perplexity per byte.

    Args:
        file: a text file to use instead of Python's documentation and standard library; its last
            tenth is the test set. examples: size of the valid and test sets, whose passages are
            spread evenly over their text.
    """

    length: int = 1024
    file: str | None = None
    examples: int = 256

    name: ClassVar[str] = "text"
    kind: ClassVar[Kind] = "tokens"
    grid: ClassVar[None] = None
    channels: ClassVar[int] = 0
    vocab: ClassVar[int] = SIZE
    classes: ClassVar[int] = SIZE
    chance: ClassVar[float] = 1 / BYTES

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ArgumentError("length", "at least 1", self.length)
        if self.examples < 1:
            raise ArgumentError("examples", "at least 1", self.examples)

    def batches(self, split: Split, size: int, seed: int = 0) -> Iterator[Batch]:
        check_request(split, size, seed)
        for index, count in enumerate(batch_sizes(split, size, self.examples)):
            random = np.random.default_rng(stream_seed(split, seed, index))
            starts = random.random(count)
            if split != "train":
                starts = np.linspace(0, 1, self.examples)[index * size : index * size + count]
            text = passages(starts, self.length, split, self.file).astype(np.int64)
            targets = torch.from_numpy(text)
            begin = torch.full((count, 1), BEGIN)
            yield Batch(torch.cat([begin, targets[:, :-1]], 1), targets)

    def describe(self) -> dict[str, Any]:
        return {"task": self.name, **asdict(self)}
