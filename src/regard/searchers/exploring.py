r"""The best of many choices, when only whole choices can be judged and few can be measured.

    best = argmin_a loss(a)   subject to   cost(a) <= limit

- "random": choices within the limit, each part alike likely.
- "evolution": the best of those measured have children: each place from one of two parents, then
  now and then any part.
- "ranking" (RankNAS): a ranker learns from pairs of measured choices which of two is better,

      P(loss(a) < loss(b)) = sigmoid(w . (x_a - x_b))        x: one-hot over (place, part)

  under which children evolve; those it ranks first are measured, and it learns again.

Where there are no more choices than measurements, all are measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from regard.core.errors import ArgumentError
from regard.searchers.architectures import Architectures, Choice, Numbers

Method = Literal["random", "evolution", "ranking"]

PATIENCE = 50
"""Children in vain, before a choice that is not measured yet is looked for in another way."""
GENERATIONS, CROWD = 5, 4
"""Of the evolution under a ranker, and children in each for every choice that is measured."""
RIDGE, ROUNDS = 1.0, 50
"""Of the ranker: weight of |w|^2 / 2, and steps of its training."""


@dataclass
class Explored:
    """What a search measured, in order, and its best: smallest loss, then cost, then order."""

    space: Architectures
    losses: dict[Choice, float] = field(default_factory=dict)

    @property
    def ranked(self) -> list[Choice]:
        """Best first."""
        return sorted(self.losses, key=lambda a: (self.losses[a], self.space.cost(a), a))

    @property
    def best(self) -> Choice:
        """The first of them."""
        return self.ranked[0]


def explore(
    space: Architectures,
    loss: Callable[[Choice], float],
    *,
    method: Method = "evolution",
    measurements: int = 64,
    population: int = 16,
    seed: int = 0,
) -> Explored:
    """Measure up to `measurements` choices, none twice. population: drawn at first, and kept as
    parents (a quarter of them).

    Raises:
        ArgumentError: numbers below 1.
    """
    if min(measurements, population) < 1:
        got = (measurements, population)
        raise ArgumentError("measurements, population", "at least 1", got)
    found, random = Explored(space), np.random.default_rng(seed)
    if space.count <= measurements:
        found.losses = {choice: loss(choice) for choice in space.every}
        return found
    while len(found.losses) < measurements:
        if method == "random" or len(found.losses) < population:
            new = _fresh(found, random)
        elif method == "evolution":
            new = _bred(found, max(2, population // 4), random)
        else:
            new = _ranked_first(found, population, random) or _fresh(found, random)
        if not new:
            break
        for choice in new[: measurements - len(found.losses)]:
            found.losses[choice] = loss(choice)
    return found


def _bred(found: Explored, parents: int, random: np.random.Generator) -> list[Choice]:
    """A child of the best that is not measured yet."""
    best = found.ranked[:parents]
    for _ in range(PATIENCE):
        child = found.space.child(best, random)
        if child not in found.losses:
            return [child]
    return _fresh(found, random)


def _ranked_first(found: Explored, count: int, random: np.random.Generator) -> list[Choice]:
    """Up to `count` choices that are not measured yet, by evolution under the ranker."""
    weights, best = ranker(found), found.ranked
    seen = dict.fromkeys(best)
    for _ in range(GENERATIONS):
        parents = best[:count]
        seen |= dict.fromkeys(found.space.child(parents, random) for _ in range(CROWD * count))
        pool = list(seen)
        order = np.argsort(-(found.space.one_hot(pool) @ weights), kind="stable")
        best = [pool[index] for index in order]
    return [choice for choice in best if choice not in found.losses][:count]


def _fresh(found: Explored, random: np.random.Generator) -> list[Choice]:
    """Any choice that is not measured yet; none where none is left."""
    for _ in range(PATIENCE):
        drawn = found.space.drawn(random)
        if drawn not in found.losses:
            return [drawn]
    left = (choice for choice in found.space.every if choice not in found.losses)
    return list(itertools.islice(left, 1))


def ranker(found: Explored) -> Numbers:
    """Weights w (parts of all places,) of a ranker that was fitted on all pairs that differ."""
    x = found.space.one_hot(list(found.losses))
    losses = np.array(list(found.losses.values()))
    less = losses[:, None] < losses  # row better than column
    pairs = less | less.T
    joins = np.diag(pairs.sum(1)) - pairs
    bend = np.linalg.inv(RIDGE * np.eye(x.shape[1]) + x.T @ joins @ x / 4)  # no slope bends more
    w = np.zeros(x.shape[1])
    for _ in range(ROUNDS):
        scores = x @ w
        wrong = less * (0.5 - 0.5 * np.tanh((scores[:, None] - scores) / 2))  # its probability
        w = w - bend @ (RIDGE * w - x.T @ (wrong.sum(1) - wrong.sum(0)))
    return w
