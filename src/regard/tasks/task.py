"""What a task is: a source of batches with a known chance level, to compare mechanisms on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from regard.core.errors import ArgumentError

Kind = Literal["tokens", "grid"]
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
IGNORED = -100


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples and their answers.

    Kind "tokens": inputs (B,N) token ids, targets (B,N), IGNORED where no answer is asked.
    Kind "grid": inputs (B, h*w, channels) row-major in [0, 1], targets (B,) class ids.
    """

    inputs: Tensor
    targets: Tensor


class Task(Protocol):
    """A source of batches: a frozen dataclass whose fields are the task's options.

    name: key in commands and records. kind: what a batch holds. vocab: number of input token ids
    (0 for grids). classes: number of possible answers. length: tokens per example. grid, channels:
    shape of a grid example. chance: accuracy of an answer that does not look up what is asked.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> Kind: ...

    @property
    def vocab(self) -> int: ...

    @property
    def classes(self) -> int: ...

    @property
    def length(self) -> int: ...

    @property
    def grid(self) -> tuple[int, ...] | None: ...

    @property
    def channels(self) -> int: ...

    @property
    def chance(self) -> float: ...

    def batches(self, split: Split, size: int, seed: int = 0) -> Iterator[Batch]:
        """Batches of `size` examples: "train" never ends, "valid" and "test" are finite (the last
        batch may be smaller). The same seed gives the same batches; splits share no stream.

        Raises:
            ArgumentError: an unknown split, a size below 1 or a negative seed.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Name and options as plain values, for records."""
        ...


def stream_seed(split: Split, seed: int, index: int = 0) -> int:
    """Seed of batch `index` of a split, below 2^32; different splits never share one."""
    word = int(np.random.SeedSequence((seed, index)).generate_state(1)[0])
    return word // 4 * 3 + SPLITS.index(split)


def check_request(split: str, size: int, seed: int) -> None:
    """Raise ArgumentError unless the arguments of `Task.batches` make sense."""
    if split not in SPLITS:
        raise ArgumentError("split", " or ".join(map(repr, SPLITS)), split)
    if size < 1:
        raise ArgumentError("size", "at least 1", size)
    if seed < 0:
        raise ArgumentError("seed", "0 or more", seed)


def batch_sizes(split: Split, size: int, examples: int) -> Iterator[int]:
    """`size` for ever in training; in the other splits until `examples` are used up."""
    left = examples
    while split == "train" or left > 0:
        yield size if split == "train" else min(size, left)
        left -= size
