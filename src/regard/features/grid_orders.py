r"""Grid orders: the ways to read the cells of a grid row by row, one per order of its axes.

2 orders of (h,w), 6 of (t,h,w); order 0 is the given one, the last axis innermost
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor


def grid_orders(grid: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """Cells (orders, cells) in each order: the row-major number of the cell at each place."""
    size = 1
    for side in grid:
        size *= side
    cells = torch.arange(size, device=device).reshape(grid)
    return torch.stack([cells.permute(axes).flatten() for axes in permutations(range(len(grid)))])
