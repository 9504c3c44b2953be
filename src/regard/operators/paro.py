r"""PAROAttention: visual tokens are read in the order of axes in which a head's attention map is
most block-wise; then small blocks are skipped and the others computed in few bits.

    o = back(softmax over kept blocks of q' k'^T s, times v')        ': in the head's order

q (B,H,N,D), k (B,H_k,N,D), v (B,H_v,N,E), N = prefix + cells of a 2-D or 3-D grid, s = 1/sqrt(D).
There are 2 orders of (h,w) and 6 of (t,h,w); prefix tokens (text) stay apart, and are read in full.
Kept are the blocks with the largest sums of attention, `density` of them. With `bits`, q and k,
or v and the weights, are rounded to integers, one scale per block.

`calibrate` (importance/cell_maps.py) finds orders and kept blocks from the maps of a few prompts,
once for all; without them they come from the call's own map, which costs as much as full attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.boundary import check_qkv, refuse
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Limit, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.scored import Impl, attend, without_padding
from regard.core.weights import Scored, Softmax, repeat_heads
from regard.features.block_quantised import quantised
from regard.features.grid_orders import grid_orders
from regard.importance.cell_maps import cell_maps, kept_blocks, laid, scores_of_orders, sides
from regard.masks.blocks import Blocks


@dataclass(frozen=True)
class RoundedSoftmax:
    """Softmax, its weights among the first `cells` tokens rounded block by block."""

    bits: int
    block: int
    cells: int
    kind: Literal["two_pass"] = "two_pass"

    def __call__(self, scores: Tensor, visible: Tensor, count: Tensor) -> Tensor:
        weights, c = Softmax()(scores, visible, count), self.cells
        rounded = quantised(weights[..., :c, :c], self.bits, self.block, self.block)
        upper = torch.cat([rounded, weights[..., :c, c:]], -1)
        return torch.cat([upper, weights[..., c:, :]], -2)


def paro(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    orders: int | tuple[int, ...] | None = None,
    kept: Tensor | None = None,
    density: float = 0.5,
    bits: tuple[int | None, int | None] = (None, None),
    block: int = 64,
    impl: Impl = "auto",
) -> Result:
    """Reordered block-sparse attention on a grid. orders: number of the order of each head, or of
    all; kept: boolean (B or 1,H,n,n) over blocks in those orders; None: from the call's own maps.
    bits: of q and k, and of weights and v; None: not rounded.

    Raises:
        UnsupportedError: a mask, or not self-attention.
    """
    check_qkv(q, k, v, call)
    refuse(call, "paro", "mask")
    if block < 1 or not 0 < density <= 1:
        raise ArgumentError("block, density", "at least 1, and in (0, 1]", (block, density))
    if q.shape[2] != k.shape[2]:
        raise UnsupportedError("paro", "queries must be the keys' own tokens")
    call = call.of_self()
    q, k, v = without_padding(q, k, v, call)
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    table = grid_orders(sides(call, k.shape[2]), q.device)
    skips, rounds = density < 1 and kept is None, any(bits)
    maps = None
    if skips or (rounds and orders is None):
        maps = cell_maps(q.detach(), k.detach(), call)
    if orders is None and maps is not None:
        cells = table[scores_of_orders(maps, table, block).argmin(-1)]  # (B,H,c)
    else:
        cells = table[_numbers(orders, q, len(table))]
    if skips and maps is not None:
        kept = kept_blocks(laid(maps, cells), block, density)
    order, c = _order(cells, call.prefix), cells.shape[-1]
    inner = _places(call, order, c, kept, block)
    q, k, v = (
        _rounded(_folded(x, order), width, block, c)
        for x, width in ((q, bits[0]), (k, bits[0]), (v, bits[1]))
    )
    method = Scored()
    if bits[1] is not None:
        method, impl = Scored(normalise=RoundedSoftmax(bits[1], block, c)), "dense"
    out = attend(q, k, v, inner, method, impl=impl).output[:, 0].unflatten(0, order.shape[:2])
    back = order.argsort(-1)[..., None].expand(-1, -1, -1, out.shape[-1])
    return Result(out.gather(2, back))


def _order(cells: Tensor, prefix: int) -> Tensor:
    """Tokens (B,H,N): the grid's in each head's order, then the prefix."""
    first = torch.arange(prefix, device=cells.device).expand(*cells.shape[:2], -1)
    return torch.cat([cells + prefix, first], -1)


def _rounded(x: Tensor, bits: int | None, block: int, cells: int) -> Tensor:
    """x (…,N,D) with its first `cells` rows rounded, one scale per block of rows."""
    if bits is None:
        return x
    return torch.cat([quantised(x[..., :cells, :], bits, block), x[..., cells:, :]], -2)


def _numbers(orders: int | tuple[int, ...] | None, q: Tensor, count: int) -> Tensor:
    """Number of each head's order (B,H)."""
    heads = q.shape[1]
    chosen = (orders or 0,) * heads if not isinstance(orders, tuple) else orders
    if len(chosen) != heads or not all(0 <= n < count for n in chosen):
        raise ArgumentError("orders", f"{heads} numbers from 0 to {count - 1}", orders)
    return torch.tensor(chosen, device=q.device).expand(q.shape[0], -1)


def _folded(x: Tensor, order: Tensor) -> Tensor:
    """x (B,H,N,D), each head in its own order (B,H,N), as sequences of one head (B*H,1,N,D)."""
    return x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1])).flatten(0, 1)[:, None]


def _places(call: Call, order: Tensor, cells: int, kept: Tensor | None, block: int) -> Call:
    """The call for tokens in `order` (B,H,N), a head as a sequence: `cells` of the grid by blocks,
    then the prefix beyond them, which sees and is seen by all.
    """
    batch, heads, tokens = order.shape
    place = torch.arange(tokens, device=order.device)
    place = torch.where(place < cells, place, place + -cells % block)
    mask = None
    if kept is not None:
        more = -(-call.prefix // block)
        chart = F.pad(kept, (0, more, 0, more), value=True)
        mask = Blocks(chart.expand(batch, heads, -1, -1).flatten(0, 1)[:, None], block)
    padding, query_padding = (
        None if x is None else x[:, None].expand(-1, heads, -1).gather(2, order).flatten(0, 1)
        for x in (call.padding, call.query_padding)
    )
    return call.but(
        mask=mask,
        padding=padding,
        query_padding=query_padding,
        query_positions=place,
        key_positions=place,
        grid=None,
        prefix=0,
    )


PARO = Card(
    name="paro",
    kind="operator",
    build=paro,
    papers=(
        Paper(
            "2506.16054",
            "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention "
            "in Visual Generation Models",
            2025,
        ),
    ),
    family="selected",
    patterns=("noncausal self",),
    grids=(2, 3),
    cost=Cost(time=2, state="none"),
    claim=Claim(
        "in the order that its scores prefer, a local map keeps more of its mass in as many blocks",
        "regard show paro",
    ),
    example=Example(grid=(2, 3, 4), prefix=1, options={"block": 4, "density": 0.4}),
    limits=tuple(Limit({"density": 1.0, "orders": n}, "softmax") for n in (0, 3, 5)),
    forms=("impl", ("dense", "sdpa", "tiled")),
    deviations=(
        "the printed score prefers maps that are less sparse; here its first term is one minus it",
        "the largest block of each row is kept whatever the density, so that no token is left out",
        "kept blocks are the same at every step of a diffusion; a caller may pass others",
    ),
)
