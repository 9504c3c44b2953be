r"""One choice for each group of heads: the exact solution of a multiple-choice knapsack.

    minimise  sum_g L[g, x_g]    so that    sum_g C[p, g, x_g] <= B[p]  for every p

L: predicted rise of the loss of group g under choice c. C: what that choice costs at input length
p. An integer programme of binary variables, solved to optimality by HiGHS through scipy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from regard.core.errors import ArgumentError, UnsupportedError

Numbers = NDArray[np.float64]
SLACK = 1e-9
"""Relative excess over a budget that counts as rounding."""
TIE = 1e-7
"""Losses that differ by less, as a part of the largest, are equal."""


def solve(
    losses: Numbers,
    costs: Numbers,
    budgets: Numbers,
    *,
    blocks: NDArray[np.int64] | None = None,
    distinct: int = 0,
    ceilings: tuple[Numbers, Numbers] | None = None,
) -> NDArray[np.int64]:
    """The choice (G,) of every group with the smallest sum of losses (G,C), within every budget
    (P,) of the costs (P,G,C).

    blocks (G,): the block of each group, of whose choices at most `distinct` may differ (0: any
    number). ceilings: further losses (R,G,C), and what the sum of each may be at most (R,). Equal
    plans: the cheaper one, then the one with the earlier choices.

    Raises:
        ArgumentError: shapes, or numbers that are not finite; budgets that cannot be met, with the
            smallest that can.
    """
    _check(losses, costs, budgets)
    least = costs.min(2).sum(1)
    if bool((least > budgets * (1 + SLACK)).any()):
        worst = int((least - budgets).argmax())
        raise ArgumentError("budget", f"at least {least[worst]:.6g}", f"{budgets[worst]:.6g}")
    scale = max(float(np.abs(losses).max()), 1e-300)
    problem = _Problem(losses.shape, costs, budgets, blocks, distinct)
    for loss, most in () if ceilings is None else zip(*ceilings, strict=True):
        problem.at_most(loss, most)
    choice = problem.solution(losses / scale)
    best = float(losses[np.arange(len(choice)), choice].sum())
    problem.at_most(losses / scale, best / scale + TIE)
    return problem.solution(_price(costs))


def _price(costs: Numbers) -> Numbers:
    """What settles ties (G,C): the costs at all lengths, and a little for later choices."""
    price = costs.sum(0) / max(float(costs.sum(0).max()), 1e-300)
    return price + 1e-4 * np.linspace(0, 1, price.shape[1])


class _Problem:
    """The integer programme: variables x[g,c], and with blocks y[b,c] >= x[g,c] of its groups."""

    def __init__(
        self,
        shape: tuple[int, int],
        costs: Numbers,
        budgets: Numbers,
        blocks: NDArray[np.int64] | None,
        distinct: int,
    ) -> None:
        self.groups, self.choices = shape
        self.blocks = None if blocks is None or not distinct else blocks
        more = 0 if self.blocks is None else (int(self.blocks.max()) + 1) * self.choices
        self.size = self.groups * self.choices + more
        self.rows: list[tuple[NDArray[np.int64], Numbers, float, float]] = []
        for cost, budget in zip(costs, budgets, strict=True):
            self.at_most(cost / max(budget, 1e-300), 1 + SLACK)
        self._one_each()
        if self.blocks is not None:
            self._few(self.blocks, distinct)

    def at_most(self, values: Numbers, most: float) -> None:
        """Demand that the sum of the chosen values (G,C) be at most so much."""
        self.rows.append((np.arange(values.size), values.ravel(), -np.inf, most))

    def _one_each(self) -> None:
        ones, own = np.ones(self.choices), np.arange(self.choices)
        for group in range(self.groups):
            self.rows.append((group * self.choices + own, ones, 1, 1))

    def _few(self, blocks: NDArray[np.int64], distinct: int) -> None:
        first, pair = self.groups * self.choices, np.array([1.0, -1.0])
        for group, block in enumerate(blocks.tolist()):
            for choice in range(self.choices):
                both = np.array([group, self.groups + block]) * self.choices + choice
                self.rows.append((both, pair, -np.inf, 0))
        ones, own = np.ones(self.choices), np.arange(self.choices)
        for block in range(int(blocks.max()) + 1):
            self.rows.append((first + block * self.choices + own, ones, -np.inf, distinct))

    def solution(self, goal: Numbers) -> NDArray[np.int64]:
        """The choices (G,) with the smallest sum of a goal (G,C).

        Raises:
            ArgumentError: no plan meets all constraints.
            UnsupportedError: scipy is missing.
        """
        try:
            from scipy.optimize import Bounds, LinearConstraint, milp
            from scipy.sparse import csr_array
        except ImportError as error:
            lacks = "scipy is missing (pip install 'regard[search]')"
            raise UnsupportedError("search", lacks) from error
        columns, values, low, high = zip(*self.rows, strict=True)
        ends: Any = np.cumsum([0, *map(len, columns)])
        parts = np.concatenate(values), np.concatenate(columns), ends
        matrix: Any = csr_array(parts, shape=(len(self.rows), self.size))
        sides: Any = np.array(low), np.array(high)
        limits = LinearConstraint(matrix, *sides)
        found = milp(
            np.pad(goal.ravel(), (0, self.size - goal.size)),
            constraints=limits,
            bounds=Bounds(0, 1),
            integrality=np.ones(self.size),
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            raise ArgumentError("budget", "constraints that some plan meets", found.message)
        return found.x[: self.groups * self.choices].reshape(self.groups, -1).argmax(1)


def _check(losses: Numbers, costs: Numbers, budgets: Numbers) -> None:
    if losses.ndim != 2 or costs.shape != (len(budgets), *losses.shape):
        raise ArgumentError("losses, costs", "(G,C) and (P,G,C)", (losses.shape, costs.shape))
    if not all(bool(np.isfinite(x).all()) for x in (losses, costs, budgets)):
        raise ArgumentError("losses, costs, budgets", "finite numbers", "others")


def front(points: Numbers) -> list[int]:
    """Which of points (n,k), all to be small, no other point beats: the Pareto front, in order."""
    found = []
    for index, point in enumerate(points):
        others = np.delete(points, index, axis=0)
        beaten = ((others <= point).all(1) & (others < point).any(1)).any()
        repeated = any(bool((points[i] == point).all()) for i in found)
        if not beaten and not repeated:
            found.append(index)
    return found
