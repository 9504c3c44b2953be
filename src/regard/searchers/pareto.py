r"""Several losses at once: the choices that no other beats, by bounding all losses but one.

    minimise  sum_g L[0, g, x_g]    so that    sum_g L[p, g, x_g] <= e[p]  for every p > 0

over a grid of bounds e, within the budgets of `regard.searchers.solver.solve`, of which a part must
be used.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

from regard.core.errors import ArgumentError
from regard.searchers.solver import Numbers, front, solve

Choice = NDArray[np.int64]
ABOVE = 1e-6
"""What a bound on a loss, as a part of the largest, is raised by against rounding."""
ROUNDING = 1e-9
"""What a floor is lowered by."""


def pareto(
    losses: Numbers,
    costs: Numbers,
    budgets: Numbers,
    *,
    blocks: Choice,
    distinct: int = 0,
    points: int = 5,
    floors: Numbers | None = None,
) -> list[Choice]:
    """Choices (G,) that no other beats in all the losses (P,G,C) at once, within budgets (Q,) of
    costs (Q,G,C): the first loss is made least, with the others bounded by a grid of `points` from
    their least to what they are where another one is least. floors (Q,): what every cost must reach
    (None: nothing).

    Raises:
        ArgumentError: as of `solve`; no choice lies between floors and budgets.
    """
    scaled = losses / np.maximum(np.abs(losses).max((1, 2), keepdims=True), 1e-300)
    rows = np.arange(losses.shape[1])
    free = floors is None
    used = (costs[:0], budgets[:0]) if free else (-costs, ROUNDING - floors)
    found = [
        solve(x, costs, budgets, blocks=blocks, distinct=distinct, ceilings=used) for x in scaled
    ]
    values = np.array([scaled[:, rows, choice].sum(1) for choice in found])
    grids = np.linspace(values.min(0), values.max(0), points).T[1:]
    for bounds in product(*grids) if len(grids) else ():
        most = np.array(bounds) + ABOVE
        ceilings = np.concatenate([scaled[1:], used[0]]), np.concatenate([most, used[1]])
        try:
            choice = solve(
                scaled[0], costs, budgets, blocks=blocks, distinct=distinct, ceilings=ceilings
            )
        except ArgumentError:  # no plan meets these bounds together
            continue
        found.append(choice)
    return [found[i] for i in front(np.array([scaled[:, rows, c].sum(1) for c in found]))]
