"""Handwritten digits: 1797 grey images of 8 x 8 pixels in ten classes, from scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from regard.core.errors import UnsupportedError
from regard.tasks.task import Batch, Kind, Split, check_request, stream_seed

HELD_OUT = 256  # images in each of the valid and test sets


@dataclass(frozen=True)
class Digits:
    """Images as grids of 64 one-channel tokens. Which image belongs to which split never changes;
    the seed only orders the training images.

    Raises UnsupportedError when batches are asked for and scikit-learn is missing.
    """

    name: ClassVar[str] = "digits"
    kind: ClassVar[Kind] = "grid"
    vocab: ClassVar[int] = 0
    classes: ClassVar[int] = 10
    length: ClassVar[int] = 64
    grid: ClassVar[tuple[int, ...]] = (8, 8)
    channels: ClassVar[int] = 1
    chance: ClassVar[float] = 0.1

    def batches(self, split: Split, size: int, seed: int = 0) -> Iterator[Batch]:
        check_request(split, size, seed)
        images, labels = _images(split)
        if split != "train":
            for start in range(0, len(labels), size):
                yield Batch(images[start : start + size], labels[start : start + size])
            return
        queue, epoch = torch.empty(0, dtype=torch.long), 0
        while True:
            while len(queue) < size:
                random = torch.Generator().manual_seed(stream_seed(split, seed, epoch))
                queue = torch.cat([queue, torch.randperm(len(labels), generator=random)])
                epoch += 1
            yield Batch(images[queue[:size]], labels[queue[:size]])
            queue = queue[size:]

    def describe(self) -> dict[str, Any]:
        return {"task": self.name, **asdict(self)}


@cache
def _images(split: Split) -> tuple[Tensor, Tensor]:
    """Images (n, 64, 1) in [0, 1] and labels (n,) of one split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UnsupportedError(
            "the digits task", "scikit-learn is missing (pip install 'regard[images]')"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))
    bounds = {"test": (0, HELD_OUT), "valid": (HELD_OUT, 2 * HELD_OUT)}
    start, stop = bounds.get(split, (len(bounds) * HELD_OUT, len(labels)))
    chosen = order[start:stop]
    images = torch.from_numpy(pixels[chosen] / 16).float()[..., None]
    return images, torch.from_numpy(labels[chosen]).long()
