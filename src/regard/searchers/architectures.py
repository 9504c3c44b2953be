r"""Choices of one of several parts for every place, within a limit of their costs.

    sum_p cost[p, a_p] <= limit        a in C_1 x ... x C_P

A choice beyond the limit is repaired: places in random order get their cheapest part until it fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, prod

import numpy as np
from numpy.typing import NDArray

from regard.core.errors import ArgumentError

Choice = tuple[int, ...]
Numbers = NDArray[np.float64]

MUTATION = 0.2
"""Probability that a place of a child gets any part."""


@dataclass(frozen=True)
class Architectures:
    """What can be chosen: costs of the parts of every place, and the limit of their sum.

    Raises:
        ArgumentError: a place without parts, or a limit that cannot be met, with the smallest that
            can.
    """

    costs: tuple[tuple[float, ...], ...]
    limit: float = inf

    def __post_init__(self) -> None:
        if not all(self.costs):
            raise ArgumentError("costs", "a part for every place", self.costs)
        least = sum(map(min, self.costs))
        if least > self.limit:
            raise ArgumentError("limit", f"at least {least:g}", self.limit)

    def cost(self, choice: Choice) -> float:
        """The sum over places."""
        return sum(costs[part] for costs, part in zip(self.costs, choice, strict=True))

    @property
    def every(self) -> Iterator[Choice]:
        """All choices within the limit, in order."""
        slack = 1e-9 * abs(self.limit)  # of sums in another order
        found = self._from((), self.limit + slack)
        return (choice for choice in found if self.cost(choice) <= self.limit)

    def _from(self, first: Choice, left: float) -> Iterator[Choice]:
        """Those that begin with some parts, so much of the limit being left."""
        if len(first) == len(self.costs):
            yield first
            return
        rest = sum(map(min, self.costs[len(first) + 1 :]))
        for part, cost in enumerate(self.costs[len(first)]):
            if cost + rest <= left:
                yield from self._from((*first, part), left - cost)

    @property
    def count(self) -> int:
        """Choices, the limit aside."""
        return prod(map(len, self.costs))

    def drawn(self, random: np.random.Generator) -> Choice:
        """Any choice within the limit."""
        found = tuple(int(random.integers(len(costs))) for costs in self.costs)
        return self.repaired(found, random)

    def child(self, parents: Sequence[Choice], random: np.random.Generator) -> Choice:
        """A choice within the limit, made of two parents and chance."""
        one, two = (parents[int(random.integers(len(parents)))] for _ in range(2))
        crossed = (pair[int(random.integers(2))] for pair in zip(one, two, strict=True))
        changed = tuple(
            int(random.integers(len(costs))) if random.random() < MUTATION else part
            for part, costs in zip(crossed, self.costs, strict=True)
        )
        return self.repaired(changed, random)

    def repaired(self, choice: Choice, random: np.random.Generator) -> Choice:
        """The choice, with the cheapest part in as many places as the limit asks for."""
        found = list(choice)
        for place in random.permutation(len(found)).tolist():
            if self.cost(tuple(found)) <= self.limit:
                break
            found[place] = int(np.argmin(self.costs[place]))
        return tuple(found)

    def one_hot(self, choices: Sequence[Choice]) -> Numbers:
        """(n, parts of all places)."""
        sizes = [len(costs) for costs in self.costs]
        columns = np.array(choices, dtype=np.int64) + np.cumsum([0, *sizes[:-1]])
        found = np.zeros((len(choices), sum(sizes)))
        np.put_along_axis(found, columns, 1.0, axis=1)
        return found
