r"""Position biases of a few agents for the tokens of an image, for images of any size.

    b_mj = resize(table_m)_j + row_m(y_j) + column_m(x_j)        (H, n, prefix + h*w)

The table is 7 x 7. Terms per row and column are learned for one grid and resized for another;
prefix tokens have entries of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.features.grid import Sides

_TABLE = 7


class GridBias(nn.Module):
    """Biases (H, n, prefix + h*w) between n agents and the tokens of an image of any size."""

    def __init__(self, heads: int, agents: int, grid: Sides, prefix: int) -> None:
        super().__init__()
        self.table = _small(heads, agents, _TABLE, _TABLE)
        self.rows = _small(heads, agents, grid[0], 1)
        self.columns = _small(heads, agents, 1, grid[1])
        self.prefix = _small(heads, agents, prefix)

    def forward(self, grid: Sides) -> Tensor:
        """The biases for a grid (h,w)."""
        bias = resized(self.table, grid) + resized(self.rows + self.columns, grid)
        return torch.cat([self.prefix, bias.flatten(2)], -1)


def _small(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))


def resized(image: Tensor, grid: Sides) -> Tensor:
    """Images (B,C,h,w) resized bilinearly to another grid."""
    if tuple(image.shape[2:]) == tuple(grid):
        return image
    return F.interpolate(image, size=grid, mode="bilinear")
