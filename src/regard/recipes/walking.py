"""Walking: batches on their way through a model's blocks, one block after the other, so that what
is done to a block shows in what the next one reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.linears import BlockLinears, sides, weight_of
from regard.core.passing import STREAM
from regard.recipes.gptq import Curvature
from regard.recipes.losses import inputs_of, real_of


@dataclass(eq=False)
class Walk:
    """A batch on its way through the blocks: the state (B,N,C) before the next block, what else
    each block is given, real tokens (B,N), and what these count in the next block (B,N).
    """

    state: Tensor
    others: dict[str, dict[str, Any]]
    real: Tensor
    weights: Tensor

    @classmethod
    def of(cls, model: Any, blocks: Sequence[BlockLinears], batch: Mapping[str, Tensor]) -> Walk:
        """The walk before its first block."""
        first: list[Tensor] = []
        others: dict[str, dict[str, Any]] = {}

        def enter(path: str, args: Any, kwargs: dict[str, Any]) -> None:
            given = dict(kwargs)
            first.append(args[0] if args else given.pop(STREAM))
            others[path] = given

        handles = [
            one.block.register_forward_pre_hook(
                lambda _, args, kwargs, path=one.path: enter(path, args, kwargs), with_kwargs=True
            )
            for one in blocks
        ]
        try:
            getattr(model, "base_model", model)(**inputs_of(batch))
        finally:
            for handle in handles:
                handle.remove()
        real = real_of(batch)
        return cls(first[0], others, real, torch.ones_like(real, dtype=torch.float64))

    def through(self, one: BlockLinears) -> Tensor:
        """The state (B,N,C) after a block."""
        found = one.block(self.state, **self.others[one.path])
        return found[0] if isinstance(found, tuple) else found


def curvature_of(one: BlockLinears, module: nn.Module, walks: Sequence[Walk]) -> Tensor:
    """H (I,I) of what a map of a block reads."""
    found = Curvature(sides(module)[0], weight_of(module).device)
    for walk in walks:
        with _read(module, found, walk.weights, walk.real):
            walk.through(one)
    return found.matrix


@contextmanager
def _read(module: nn.Module, into: Curvature, weights: Tensor, real: Tensor) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda _, args: into.add(args[0], weights, real))
    try:
        yield
    finally:
        handle.remove()
