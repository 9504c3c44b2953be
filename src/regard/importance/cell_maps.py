r"""Cell maps: attention between the cells of a grid, by which heads choose an order of the grid and
the blocks they keep.

    A (B,H,c,c): softmax rows of q k^T s over all tokens, without the rows and columns of the prefix
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.boundary import grid_of
from regard.core.call import Call
from regard.core.weights import Softmax, group_scores, scale_of
from regard.features.grid_orders import grid_orders
from regard.importance.reordering import largest_blocks, order_scores, tiles_of_map


def cell_maps(q: Tensor, k: Tensor, call: Call) -> Tensor:
    """Softmax maps (B,H,c,c) of the grid's cells, as parts of maps of all tokens."""
    scores = group_scores(q, k) * scale_of(call, None, q.shape[-1])
    real = call.padding
    if real is None:
        real = torch.ones(q.shape[0], k.shape[2], dtype=torch.bool, device=q.device)
    visible = real[:, None, None] & real[:, None, :, None]
    weights = Softmax()(scores, visible, visible.sum(-1, keepdim=True))
    return weights[..., call.prefix :, call.prefix :]


def calibrate(
    q: Tensor, k: Tensor, call: Call, *, block: int = 64, density: float = 0.5, balance: float = 0.5
) -> tuple[tuple[int, ...], Tensor]:
    """Orders of the heads and kept blocks (1,H,n,n), from the queries and keys of a batch of
    prompts; balance: weight of sparsity against roughness.
    """
    maps, table = cell_maps(q, k, call), grid_orders(sides(call, k.shape[2]), q.device)
    orders = scores_of_orders(maps, table, block, balance).mean(0).argmin(-1)  # (H,)
    cells = table[orders].expand(q.shape[0], -1, -1)
    return tuple(orders.tolist()), kept_blocks(laid(maps, cells).mean(0)[None], block, density)


def scores_of_orders(maps: Tensor, table: Tensor, block: int, balance: float = 0.5) -> Tensor:
    """Scores (B,H,orders) of maps (B,H,c,c) in each order of a table (orders, c); least is best."""
    return order_scores(
        lambda i: maps[..., table[i][:, None], table[i]], len(table), block, balance
    )


def laid(maps: Tensor, cells: Tensor) -> Tensor:
    """Maps (B,H,c,c) with each head's cells (B,H,c) in its order."""
    rows = maps.gather(2, cells[..., None].expand_as(maps))
    return rows.gather(3, cells[:, :, None].expand_as(maps))


def kept_blocks(maps: Tensor, block: int, density: float) -> Tensor:
    """The largest blocks (B,H,n,n) of maps (B,H,c,c), and each row's largest one."""
    sums = tiles_of_map(maps, block)[0].sum(-1)
    return largest_blocks(maps, block, density) | (sums == sums.amax(-1, keepdim=True))


def sides(call: Call, tokens: int) -> tuple[int, ...]:
    """The call's grid, of two or three sides."""
    dims = len(call.grid) if call.grid is not None and len(call.grid) in (2, 3) else 3
    return grid_of(call, dims, tokens)
