r"""A Markov chain with triggers, after which the token before them comes again.

    x_t = x_{t-2} if x_{t-1} is a trigger, else x_t ~ P(x_{t-1}, .)        P: (V,V)

x_0 is the token V, which begins every sequence; x_1 is drawn as often as a walk along P meets each
token, triggers left out. So two triggers never meet (Bigram–Backcopy, 2410.13835).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Chain:
    """transition: P (V,V). visits: how often a walk along P meets each token (V,). triggers:
    (V+1,), True at trigger tokens. Token V begins a sequence.
    """

    transition: NDArray[np.float64]
    visits: NDArray[np.float64]
    triggers: NDArray[np.bool_]

    @classmethod
    def drawn(cls, symbols: int, triggers: int, seed: int) -> Chain:
        """Rows ~ Dirichlet(0.1)."""
        p = np.random.default_rng(seed).dirichlet(np.full(symbols, 0.1), symbols)
        lazy = (p + np.eye(symbols)) / 2  # the same visits, and no period
        visits = np.linalg.matrix_power(lazy, 1 << 14)[0]
        return cls(p, visits, np.isin(np.arange(symbols + 1), np.argsort(-visits)[:triggers]))

    def sequences(self, random: np.random.Generator, count: int, length: int) -> Tensor:
        """Token ids (count, length)."""
        symbols = len(self.transition)
        start = np.where(self.triggers[:-1], 0, self.visits).cumsum()
        rows, draws = self.transition.cumsum(1), random.random((length, count, 1))
        x = np.full((count, length), symbols)
        for t in range(1, length):
            edges = start / start[-1] if t == 1 else rows[x[:, t - 1]]
            x[:, t] = (edges < draws[t]).sum(-1).clip(max=symbols - 1)
            if t > 1:
                x[:, t] = np.where(self.triggers[x[:, t - 1]], x[:, t - 2], x[:, t])
        return torch.from_numpy(x)


def prediction_loss(model: nn.Module, x: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of every token of sequences x (B,N+1) from those before it."""
    return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
