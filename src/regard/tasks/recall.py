r"""Multi-query associative recall (Zoology, 2312.04927): key–value pairs, then every key is asked
once.

    k1 v1 k2 v2 … kn vn   0 0 k2 0 0 0 k1 0 …        the answer at a key is its value

Keys come from [1, V/2), values from [V/2, V), each without repetition. After the pairs, key i
stands at an even offset 2 g_i, where the g_i are drawn without replacement with p(g) ~ (g+1)^(a-1):
a small a asks early, a = 1 anywhere. A model must find the earlier occurrence of the token it reads
and report what followed; what it cannot do is solve this with a state too small for the pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.tasks.task import IGNORED, Batch, Kind, Split, batch_sizes, check_request, stream_seed

Fill = Literal["blank", "noise", "published"]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Recall:
    """Multi-query associative recall.

    Args:
        vocab: token ids V. length: tokens per example, even. pairs: key–value pairs, at most
            length/4. power: exponent a of the gap distribution. fill: what stands where nothing is
            asked: "blank" (id 0, as in the paper's runs), "noise" (random ids that are none of the
            example's keys) or "published" (random ids, which may repeat a key). examples: size of
            the valid and test sets.
    """

    vocab: int = 8192
    length: int = 64
    pairs: int = 8
    power: float = 0.01
    fill: Fill = "blank"
    examples: int = 1024

    name: ClassVar[str] = "recall"
    kind: ClassVar[Kind] = "tokens"
    grid: ClassVar[None] = None
    channels: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.length < 2 or self.length % 2:
            raise ArgumentError("length", "an even number of tokens", self.length)
        if self.pairs < 1 or 4 * self.pairs > self.length:
            raise ArgumentError("pairs", f"1 to length/4 = {self.length // 4}", self.pairs)
        if self.vocab // 2 - 1 < self.pairs:
            raise ArgumentError("vocab", f"at least {2 * self.pairs + 2} for the keys", self.vocab)
        if not 0 < self.power <= 1:
            raise ArgumentError("power", "a number in (0, 1]", self.power)
        if self.fill not in ("blank", "noise", "published"):
            raise ArgumentError("fill", "'blank', 'noise' or 'published'", self.fill)
        if self.examples < 1:
            raise ArgumentError("examples", "at least 1", self.examples)

    @property
    def classes(self) -> int:
        """Every token id may be an answer."""
        return self.vocab

    @property
    def chance(self) -> float:
        """Guessing among the values shown."""
        return 1 / self.pairs

    def batches(self, split: Split, size: int, seed: int = 0) -> Iterator[Batch]:
        check_request(split, size, seed)
        for index, count in enumerate(batch_sizes(split, size, self.examples)):
            yield Batch(*self.draw(stream_seed(split, seed, index), count))

    def describe(self) -> dict[str, Any]:
        return {"task": self.name, **asdict(self)}

    def draw(self, seed: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both (count, length); a seed means the published examples of it."""
        random = np.random.RandomState(seed)
        half, room = self.vocab // 2, self.length // 2 - self.pairs
        weight = np.arange(1, room + 1) ** (self.power - 1.0)
        weight = weight / weight.sum()
        keys = 1 + _rows(count, lambda: random.permutation(half - 1)[: self.pairs])
        values = half + _rows(count, lambda: random.permutation(self.vocab - half)[: self.pairs])
        gaps = _rows(count, lambda: random.choice(room, self.pairs, replace=False, p=weight))
        asked = 2 * (self.pairs + gaps)  # (count, pairs): where each key is asked

        inputs = np.zeros((count, self.length), dtype=np.int64)
        inputs[:, 0 : 2 * self.pairs : 2], inputs[:, 1 : 2 * self.pairs : 2] = keys, values
        np.put_along_axis(inputs, asked, keys, axis=1)
        targets = np.full_like(inputs, IGNORED)
        np.put_along_axis(targets, asked, values, axis=1)
        filled = self._filled(torch.from_numpy(inputs), torch.from_numpy(keys), seed)
        return filled, torch.from_numpy(targets)

    def _filled(self, inputs: Tensor, keys: Tensor, seed: int) -> Tensor:
        if self.fill == "blank":
            return inputs
        noise = torch.randint(
            self.vocab, inputs.shape, generator=torch.Generator().manual_seed(seed)
        )
        if self.fill == "noise":
            noise = noise.masked_fill((noise[..., None] == keys[:, None]).any(-1), 0)
        return torch.where(inputs == 0, noise, inputs)


def _rows(count: int, draw: Callable[[], Integers]) -> Integers:
    return np.stack([draw() for _ in range(count)])


def golden_batches(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The examples of the authors' generator (HazyResearch/zoology d88d6f5, multiquery_ar) for its
    arguments: `inputs` and `labels`, (num_examples, input_seq_len).
    """
    task = Recall(
        vocab=config["vocab_size"],
        length=config["input_seq_len"],
        pairs=config.get("num_kv_pairs", 8),
        power=config.get("power_a", 0.01),
        fill="published" if config.get("random_non_queries", True) else "blank",
    )
    inputs, targets = task.draw(config["seed"], config["num_examples"])
    return {"inputs": inputs, "labels": targets}
