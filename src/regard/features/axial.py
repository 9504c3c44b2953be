r"""Axial rotary angles: half of the channel pairs turn with the row, half with the column.

    angles(r, c) = [r rates, c rates]        rates = 10000^(-m/(D/4 - 1)), m = 0..D/4 - 1

For `rotate` of `regard.features.rotary`. The slowest rate is 1/10000 whatever D (RetNet's spacing).
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.errors import ArgumentError


def axial_angles(grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """Angles (h*w, width/2) of the cells of a grid, row by row."""
    if width % 4:
        raise ArgumentError("width", "a head width that 4 divides, for axial positions", width)
    spacing = torch.linspace(0, 1, width // 4, device=device, dtype=torch.float64)
    rates = 10000.0**-spacing
    rows, columns = (torch.arange(side, device=device, dtype=torch.float64) for side in grid)
    cells = torch.cartesian_prod(rows, columns)  # (h*w, 2)
    return (cells[:, :, None] * rates).flatten(1)
