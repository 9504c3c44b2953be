r"""Copying: symbols are shown, then asked for in order.

    selective   0 s1 0 0 s2 s3 0 … sn 0 | 1 1 1 … 1        plain   s1 s2 … sn 0 0 0 … 0 | 1 1 1 … 1

Id 0 is blank, id 1 asks: the answer at the i-th ask is the i-th symbol. Plain copying (unitary
recurrent networks, 1511.06464) can be solved by a fixed delay; the selective one (Mamba,
2312.00752), whose symbols stand at random places, needs to look at content.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from regard.core.errors import ArgumentError
from regard.tasks.task import IGNORED, Batch, Kind, Split, batch_sizes, check_request, stream_seed

BLANK, ASK = 0, 1


@dataclass(frozen=True)
class Copying:
    """Copying of `symbols` out of `alphabet` many, in examples of `length` tokens, asks included.

    Args:
        selective: symbols at random places instead of the front. examples: size of the valid and
            test sets.
    """

    length: int = 64
    symbols: int = 8
    alphabet: int = 16
    selective: bool = True
    examples: int = 1024

    name: ClassVar[str] = "copying"
    kind: ClassVar[Kind] = "tokens"
    grid: ClassVar[None] = None
    channels: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.symbols < 1 or 2 * self.symbols > self.length:
            raise ArgumentError("symbols", f"1 to length/2 = {self.length // 2}", self.symbols)
        if self.alphabet < 2:
            raise ArgumentError("alphabet", "at least 2", self.alphabet)
        if self.examples < 1:
            raise ArgumentError("examples", "at least 1", self.examples)

    @property
    def vocab(self) -> int:
        """The alphabet, blank and ask."""
        return self.alphabet + 2

    @property
    def classes(self) -> int:
        """As the vocabulary: logits are over token ids."""
        return self.vocab

    @property
    def chance(self) -> float:
        """Guessing a symbol."""
        return 1 / self.alphabet

    def batches(self, split: Split, size: int, seed: int = 0) -> Iterator[Batch]:
        check_request(split, size, seed)
        for index, count in enumerate(batch_sizes(split, size, self.examples)):
            yield self._draw(stream_seed(split, seed, index), count)

    def describe(self) -> dict[str, Any]:
        return {"task": self.name, **asdict(self)}

    def _draw(self, seed: int, count: int) -> Batch:
        random = torch.Generator().manual_seed(seed)
        shown = self.length - self.symbols
        symbols = torch.randint(2, self.vocab, (count, self.symbols), generator=random)
        places = torch.arange(self.symbols).expand(count, -1)
        if self.selective:
            order = torch.rand(count, shown, generator=random).argsort(-1)
            places = order[:, : self.symbols].sort(-1).values
        inputs = torch.full((count, self.length), BLANK).scatter(1, places, symbols)
        inputs[:, shown:] = ASK
        targets = torch.full((count, self.length), IGNORED)
        targets[:, shown:] = symbols
        return Batch(inputs, targets)
