r"""The course of a dictionary's training: its rates, and when features are looked over.

    rate(t) = rate (low + (1 - low) (1 - cos(pi t / warm_up)) / 2)

t: steps since the start, or since features were redrawn; from warm_up on it stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from regard.core.errors import ArgumentError


@dataclass(frozen=True)
class Course:
    """How to train. sparsity: lambda. every: steps between looks for dead features, of which the
    first `redraws` redraw them; looked_at: batches from which inputs are drawn.
    """

    rate: float = 1.2e-3
    betas: tuple[float, float] = (0.0, 0.9999)
    sparsity: float = 0.5
    warm_up: int = 1000
    low: float = 0.1
    every: int = 25_000
    redraws: int = 4
    dead: float = 1e-6
    redrawn: float = 0.2
    looked_at: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.warm_up, self.every, self.looked_at) < 1:
            sizes = (self.warm_up, self.every, self.looked_at)
            raise ArgumentError("warm_up, every, looked_at", "1 or more", sizes)
        if self.rate <= 0 or self.sparsity < 0 or not 0 <= self.low <= 1:
            got = (self.rate, self.sparsity, self.low)
            raise ArgumentError("rate, sparsity, low", "above 0, 0 or more, 0 to 1", got)

    def rate_at(self, step: int) -> float:
        """Learning rate so many steps after the start of a warm-up."""
        share = min(step / self.warm_up, 1.0)
        return self.rate * (self.low + (1 - self.low) * (1 - math.cos(math.pi * share)) / 2)
