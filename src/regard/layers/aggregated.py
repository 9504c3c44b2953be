r"""Aggregated attention (TransNeXt, 2311.17132): one softmax over the window around a cell and over
the whole grid pooled.

    A = softmax([q_i . k_window + b , q_i . k_pooled + B])        q, B: as in `length_scaled`
    o_i = sum_window (A + n_i . T + t) v + sum_pooled A v         n_i = W_q x_i / |W_q x_i|
    pooled cells: LayerNorm(mean of GELU(W_s x) over a bin), through the same W_k and W_v

x: (B, h*w, C), row-major; window: k x k cells; b (H,k^2), T (H,D,k^2) and t (H,1,k^2) are learned.
Cells outside the grid and padded ones weigh nothing, a bin is the mean of its real cells, and the
count n that scales a query is that of the keys it sees.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.call import Call
from regard.core.errors import ArgumentError
from regard.core.weights import Softmax
from regard.features.grid import Sides, to_image, to_tokens
from regard.layers.attention import split_heads
from regard.layers.length_scaled import CosineHeads


class AggregatedAttention(CosineHeads):
    """Each cell attends to its window and to the pooled grid.

    window: odd side of the window, in cells. reduction: side of a pooled bin. pool: side of the
    pooled grid, instead of a reduction (then the cost is linear in the cells). Others: CosineHeads.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 3,
        reduction: int = 8,
        pool: int | None = None,
        bias: bool = True,
        pretrain_grid: Sides | None = None,
    ) -> None:
        super().__init__(dim, heads, bias=bias, pretrain_grid=pretrain_grid)
        if window < 1 or window % 2 == 0:
            raise ArgumentError("window", "an odd number", window)
        if reduction < 1 or (pool is not None and pool < 1):
            raise ArgumentError("reduction, pool", "at least 1", (reduction, pool))
        self.window, self.reduction, self.pool = window, reduction, pool
        area, width = window**2, dim // heads
        self.local_bias = nn.Parameter(torch.empty(heads, area))
        self.local_tokens = nn.Parameter(torch.empty(heads, width, area))
        self.local_offset = nn.Parameter(torch.zeros(heads, 1, area))
        nn.init.trunc_normal_(self.local_bias, std=0.0004)
        nn.init.trunc_normal_(self.local_tokens, std=0.02)
        self.reduce = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def pooled_sides(self, grid: Sides) -> Sides:
        """The pooled grid."""
        sides = [self.pool or side // self.reduction for side in grid]
        if any(not 1 <= few <= side for few, side in zip(sides, grid, strict=True)):
            raise ArgumentError(
                "call.grid", f"at least {self.pool or self.reduction} cells a side", grid
            )
        return sides[0], sides[1]

    def forward(self, x: Tensor, call: Call = Call()) -> Tensor:
        """x (B,h*w,C) -> (B,h*w,C)."""
        x, call, grid = self.enter(x, call)
        few = self.pooled_sides(grid)
        real = torch.ones_like(x[..., 0]) if call.padding is None else call.padding.to(x.dtype)
        bins, filled = self.bins(x, real, grid, few)
        inside = windows(real[:, None, :, None], grid, self.window)[:, 0, ..., 0] > 0
        visible = torch.cat([inside, filled[:, None].expand(-1, x.shape[1], -1)], -1)
        count = visible.sum(-1)

        q = self.directions(x, self.q_proj)  # (B, H, N, D)
        queries = self.scaled(q, count)
        k = windows(self.directions(x, self.k_proj), grid, self.window)  # (B, H, N, area, D)
        v = split_heads(self.v_proj(x) * real[..., None], self.heads)
        near = (k @ queries[..., None])[..., 0] + self.local_bias[:, None]
        far = queries @ self.directions(bins, self.k_proj).transpose(-1, -2)
        far = far + self.offsets(grid, few, self.pretrain_grid or grid)
        scores = torch.cat([near, far], -1)
        weights = Softmax()(scores, visible[:, None], count[:, None, :, None])
        near, far = weights.split([self.window**2, bins.shape[1]], -1)
        near = near + q @ self.local_tokens + self.local_offset
        out = (near[..., None, :] @ windows(v, grid, self.window))[..., 0, :]
        out = out + far @ split_heads(self.v_proj(bins), self.heads)
        return self.heads_out(out, x, call)

    def bins(self, x: Tensor, real: Tensor, grid: Sides, few: Sides) -> tuple[Tensor, Tensor]:
        """Pooled cells (B,P,C) of x (B,N,C), and which of them hold a real cell (B,P)."""
        image = to_image(F.gelu(self.reduce(x)) * real[..., None], grid)
        share = F.adaptive_avg_pool2d(to_image(real[..., None], grid), few)
        mean = F.adaptive_avg_pool2d(image, few) / share.masked_fill(share == 0, 1.0)
        return self.norm(to_tokens(mean)), share.flatten(1) > 0


def windows(x: Tensor, grid: Sides, side: int) -> Tensor:
    """The side x side cells around each cell, zeros beyond the grid: (B,H,N,D) ->
    (B,H,N,area,D).
    """
    channels = x.transpose(2, 3).flatten(1, 2)  # (B, H*D, N)
    around = F.unfold(channels.unflatten(2, grid), side, padding=side // 2)
    return around.unflatten(1, (x.shape[1], x.shape[3], side**2)).permute(0, 1, 4, 3, 2)
