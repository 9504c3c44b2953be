r"""Gated running means that start anew in every chunk.

    m_t = g_t ⊙ m_{t-1} + (1 - g_t) ⊙ x_t        m = 0 before the first token of each chunk of L

A loop over the L places of a chunk, for all chunks at once. Each token says where it stands, so
padded tokens stand nowhere and a chunk begun in an earlier call can be continued.
"""

from __future__ import annotations

import torch
from torch import Tensor


def chunk_means(
    x: Tensor, gate: Tensor, slots: Tensor, grid: tuple[int, int], start: Tensor | None
) -> Tensor:
    """Means (B,n,L,W) at every place of `grid` = (n, L), from x and gate (B,T,W).

    slots (B,T): token t stands at place slots mod L of chunk slots // L; n * L means nowhere. An
    empty place repeats the mean before it. start (B,W): the first chunk's mean so far.
    """
    keep = _placed(gate, slots, grid, 1.0)
    written = _placed((1 - gate) * x, slots, grid, 0.0)
    mean = torch.zeros_like(written[:, :, 0])
    if start is not None:
        mean = torch.cat([start[:, None], mean[:, 1:]], 1)
    means = []
    for place in range(grid[1]):
        mean = keep[:, :, place] * mean + written[:, :, place]
        means.append(mean)
    return torch.stack(means, 2)


def _placed(x: Tensor, slots: Tensor, grid: tuple[int, int], fill: float) -> Tensor:
    """x (B,T,W) at its slots of a grid of chunks (B,n,L,W)."""
    room = x.new_full((x.shape[0], grid[0] * grid[1] + 1, x.shape[2]), fill)
    return room.scatter(1, slots[..., None].expand_as(x), x)[:, :-1].unflatten(1, grid)
