r"""Induction: a segment of symbols shows up again, and what followed before follows now.

    dense   begin s1 s2 … sn s1 s2 … sn s1 …        text   begin … s1 s2 … sn … s1 s2 … s(n-1)

Every token of a repetition but its first is known from the one before it, whatever the lag, which
differs from example to example: a head that looks at a fixed distance back does not solve this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from regard.core.errors import ArgumentError
from regard.tasks.corpus import excerpts
from regard.tasks.needle import distinct_symbols
from regard.tasks.task import IGNORED, Batch, Kind, Split, batch_sizes, check_request, stream_seed
from regard.tasks.vocabulary import BEGIN, SIZE, SYMBOLS

Fill = Literal["dense", "text"]


@dataclass(frozen=True)
class Induction:
    """Segments that come again.

    Args:
        shortest, longest: symbols per segment, drawn for every example. fill: "dense": the segment
            is repeated until the end; "text": it stands at a random place in text, and once more at
            the end. examples: size of the valid and test sets.
    """

    length: int = 64
    shortest: int = 4
    longest: int = 24
    fill: Fill = "dense"
    examples: int = 256

    name: ClassVar[str] = "induction"
    kind: ClassVar[Kind] = "tokens"
    grid: ClassVar[None] = None
    channels: ClassVar[int] = 0
    vocab: ClassVar[int] = SIZE
    classes: ClassVar[int] = SIZE

    def __post_init__(self) -> None:
        if self.fill not in ("dense", "text"):
            raise ArgumentError("fill", "'dense' or 'text'", self.fill)
        room = self.length - 2 if self.fill == "dense" else self.length // 2
        if not 2 <= self.longest <= min(SYMBOLS, room):
            raise ArgumentError("longest", f"2 to {min(SYMBOLS, room)}", self.longest)
        if not 2 <= self.shortest <= self.longest:
            raise ArgumentError("shortest", f"2 to longest = {self.longest}", self.shortest)
        if self.examples < 1:
            raise ArgumentError("examples", "at least 1", self.examples)

    @property
    def chance(self) -> float:
        """Guessing among the symbols of the segment."""
        return 1 / self.longest

    def batches(self, split: Split, size: int, seed: int = 0) -> Iterator[Batch]:
        check_request(split, size, seed)
        for index, count in enumerate(batch_sizes(split, size, self.examples)):
            random = np.random.default_rng(stream_seed(split, seed, index))
            segments = distinct_symbols(random, count, self.longest)
            sizes = random.integers(self.shortest, self.longest + 1, count)
            if self.fill == "dense":
                yield self._dense(segments, sizes)
            else:
                text = excerpts(random, count, self.length, split)
                yield self._in_text(segments, sizes, text, random.random(count))

    def describe(self) -> dict[str, Any]:
        return {"task": self.name, **asdict(self)}

    def _dense(self, segments: NDArray[np.int64], sizes: NDArray[np.int64]) -> Batch:
        """Segments (B, longest), of which the first `sizes` (B,) symbols count, again and again."""
        place = np.arange(self.length)
        tokens = np.take_along_axis(segments, place % sizes[:, None], 1)  # (B, length)
        known = place > sizes[:, None]
        return _batch(tokens, known)

    def _in_text(
        self,
        segments: NDArray[np.int64],
        sizes: NDArray[np.int64],
        text: NDArray[np.int64],
        depth: NDArray[np.float64],
    ) -> Batch:
        """Each segment at a depth in [0, 1) of the text (B, length), and again at the end."""
        tokens, known = text.copy(), np.zeros(text.shape, dtype=bool)
        for row, (size, where) in enumerate(zip(sizes, depth, strict=True)):
            start = int(where * (self.length - 2 * size + 1))
            tokens[row, start : start + size] = segments[row, :size]
            tokens[row, -size:] = segments[row, :size]
            known[row, 1 - size :] = True
        return _batch(tokens, known)


def _batch(tokens: NDArray[np.int64], known: NDArray[np.bool_]) -> Batch:
    """Tokens (B,N) after the one every sequence begins with; `known` says which are answers."""
    begin = np.full((len(tokens), 1), BEGIN)
    inputs = np.concatenate([begin, tokens[:, :-1]], 1)
    targets = np.where(known, tokens, IGNORED)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))
