"""Pieces of text for studies on how well bytes are predicted."""

from __future__ import annotations

import numpy as np
import torch

from regard.core.errors import ArgumentError
from regard.core.passage import Passage
from regard.tasks.corpus import excerpts
from regard.tasks.task import Split, stream_seed
from regard.tasks.vocabulary import BEGIN

ROWS = 32
"""Pieces read side by side."""


def texts(length: int, count: int, split: Split, seed: int) -> list[Passage]:
    """`count` pieces of `length` bytes from random places of a split's text, each after the token
    that begins a sequence.

    Raises:
        ArgumentError: no piece, or an empty one.
    """
    if length < 1 or count < 1:
        raise ArgumentError("length, count", "at least 1", (length, count))
    random = np.random.default_rng(stream_seed(split, seed, 0))
    pieces = torch.from_numpy(excerpts(random, count, length, split))
    begun = torch.cat([torch.full((count, 1), BEGIN), pieces], 1)
    return [Passage({"input_ids": ids}, ids) for ids in begun.split(ROWS)]
