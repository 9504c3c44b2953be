r"""Low-rank tuning: a model's linear maps learn by a product of two thin matrices.

    W <- W + 2 B A        W: (out, in), fixed; A: (R, in), B: (out, R), zero at first

When it is done the product is added to W, and the model is of its own kind again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from regard.core.errors import ArgumentError
from regard.core.linears import blocks_of

GAIN = 2.0  # alpha / rank, as is usual


class LowRank(nn.Module):
    """What is added to a weight like `weight`."""

    def __init__(self, weight: Tensor, rank: int, random: torch.Generator) -> None:
        super().__init__()
        out, into = weight.shape
        wide = torch.promote_types(weight.dtype, torch.float32)
        drawn = torch.randn(rank, into, generator=random, dtype=wide) / into**0.5
        self.a = nn.Parameter(drawn.to(weight.device))
        self.b = nn.Parameter(torch.zeros(out, rank, dtype=wide, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (GAIN * self.b @ self.a).to(weight.dtype)


@contextmanager
def low_rank(model: Any, rank: int, seed: int = 0) -> Iterator[None]:
    """A context in which only thin matrices beside the linear maps of a model's blocks learn; at
    its end they are merged into them, after an exception too, and everything may learn that could.

    Raises:
        ArgumentError: a rank below 1.
        UnsupportedError: a model of unknown parts.
    """
    if rank < 1:
        raise ArgumentError("rank", "at least 1", rank)
    random = torch.Generator().manual_seed(seed)
    wanting = [p for p in model.parameters() if p.requires_grad]
    modules = [m for one in blocks_of(model) for m in one.all]
    model.requires_grad_(False)
    try:
        for module in modules:
            like: Any = module.weight
            parametrize.register_parametrization(module, "weight", LowRank(like, rank, random))
        yield
    finally:
        for module in modules:
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        for parameter in wanting:
            parameter.requires_grad_(True)
