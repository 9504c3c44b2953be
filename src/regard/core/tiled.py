r"""Tiled executor: blocks of queries against their visible blocks of keys only, forward and
backward.

A tile is a block of query rows with every key any of them may see, so a row is always whole: any
normaliser works, two-pass ones included, and no N x M matrix is ever held. Blocks nobody sees are
never touched. Plain softmax tiles go through scaled_dot_product_attention, others through two
matrix products. The backward pass computes each tile again, so that training needs no more memory
than inference: it keeps q, k, v and one tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.errors import UnsupportedError
from regard.core.frame import Frame, Pairs
from regard.core.mask import Mask
from regard.core.tiling import BLOCK, Tile, width
from regard.core.weights import (
    Scored,
    Softmax,
    group_scores,
    group_values,
    normalised,
    summed_bias,
)

WORKSPACE = 256 * 2**20


@dataclass(frozen=True, eq=False)
class Work:
    """Everything a tile needs besides q, k and v. group: query heads per key and value head."""

    frame: Frame
    mask: Mask | None
    method: Scored
    scale: float
    need_lse: bool
    group: int
    tiles: Sequence[Tile]


def fitted_block(work: Work, batch: int, itemsize: int, workspace: int = WORKSPACE) -> int:
    """Query rows per tile, so that three copies of the widest tile's scores fit the workspace (six,
    where a bias is computed for every pair).
    """
    widest = max((width(t) for t in work.tiles), default=1)
    copies = 3 if work.method.block_bias is None else 6
    rows = workspace // max(1, copies * batch * work.frame.heads * widest * itemsize)
    block = BLOCK
    while block > max(rows, 1):
        block //= 2
    return block


def run_tiles(q: Tensor, k: Tensor, v: Tensor, work: Work) -> tuple[Tensor, Tensor | None]:
    """Output (B,H,N,E) and, on request, log-sum-exp (B,H,N)."""
    method = work.method
    if torch.is_grad_enabled() and not method.captures and _hides_gradients(method, work.frame):
        raise UnsupportedError(
            "impl='tiled'",
            "score or normalise close over tensors that need gradients: list them in captures",
        )
    result: Any = _Tiled.apply(work, q, k, v, method.key_bias, *method.captures)
    return result if work.need_lse else (result, None)


def _hides_gradients(method: Scored, frame: Frame) -> bool:
    """Whether one score already carries a gradient that is not that of q, k, v or the key bias."""
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=frame.key_positions.device)
    scores = zero.double()
    if method.score is not None:
        scores = method.score(scores, zero, zero, zero, zero)
    weights = method.normalise(scores, zero == 0, zero + 1)
    return scores.requires_grad or weights.requires_grad


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        work: Work,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        *captures: Tensor,
    ) -> Any:
        ctx.work = work
        ctx.save_for_backward(q, k, v, *captures)
        ctx.bias = bias
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        lse = q.new_full(q.shape[:3], float("-inf")) if work.need_lse else None
        for tile in work.tiles:
            part, part_lse = _compute(work, tile, *_pieces(work, tile, q, k, v, bias))
            out[:, tile.heads, tile.rows] = part
            if lse is not None and part_lse is not None:
                lse[:, tile.heads, tile.rows] = part_lse
        return out if lse is None else (out, lse)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        work: Work = ctx.work
        q, k, v, *captures = ctx.saved_tensors
        sources = [q, k, v] + ([] if ctx.bias is None else [ctx.bias])
        totals = [torch.zeros_like(x) for x in (*sources, *captures)]
        for tile in work.tiles:
            pieces = _pieces(work, tile, q, k, v, ctx.bias)
            leaves = [x.detach().requires_grad_() for x in pieces if x is not None]
            with torch.enable_grad():
                results = _compute(work, tile, *leaves, *([None] if ctx.bias is None else []))
            wanted = [*leaves, *captures]
            outputs = [r for r in results if r is not None]
            given = [g[:, tile.heads, tile.rows] for g in upstream]
            gradients = torch.autograd.grad(outputs, wanted, given, allow_unused=True)
            _accumulate(work, tile, totals, gradients)
        bias = totals[3] if ctx.bias is not None else None
        own = totals[3 if bias is None else 4 :]
        return None, totals[0], totals[1], totals[2], bias, *own


def _pieces(
    work: Work, tile: Tile, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    heads = _shared(tile.heads, work.group)
    part = None if bias is None else bias[:, _own(tile.heads, bias)][..., tile.keys]
    return q[:, tile.heads, tile.rows], _keys(k[:, heads], tile), _keys(v[:, heads], tile), part


def _keys(x: Tensor, tile: Tile) -> Tensor:
    """The tile's rows of x (B,h,M,D): a view where they are consecutive."""
    return x[:, :, tile.keys] if isinstance(tile.keys, slice) else x.index_select(2, tile.keys)


def _shared(heads: slice, group: int) -> slice:
    """Key heads that a run of query heads reads."""
    return slice(heads.start // group, -(-heads.stop // group))


def _own(heads: slice, x: Tensor) -> slice:
    return heads if x.shape[1] > 1 else slice(0, 1)


def _accumulate(
    work: Work, tile: Tile, totals: list[Tensor], gradients: Sequence[Tensor | None]
) -> None:
    if gradients[0] is not None:
        totals[0][:, tile.heads, tile.rows] = gradients[0]
    for index in (1, 2):
        _add(totals[index][:, _shared(tile.heads, work.group)], gradients[index], tile.keys)
    first = 3
    if work.method.key_bias is not None:
        _add(totals[3][:, _own(tile.heads, totals[3])][..., None], gradients[3], tile.keys)
        first = 4
    for total, gradient in zip(totals[first:], gradients[first:], strict=True):
        if gradient is not None:
            total += gradient


def _add(total: Tensor, gradient: Tensor | None, keys: slice | Tensor) -> None:
    if gradient is None:
        return
    gradient = gradient if gradient.ndim == 4 else gradient[..., None]
    if isinstance(keys, slice):
        total[:, :, keys] += gradient
    else:
        total.index_add_(2, keys, gradient)


def _compute(
    work: Work, tile: Tile, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One tile: q (B,h,n,D), k and v (B,·,m,·), bias (B or 1, h or 1, m)."""
    method = replace(work.method, key_bias=bias)
    looks = not tile.full or method.score is not None or method.block_bias is not None
    pairs = _pairs(work, tile, q.device) if looks else None
    visible = None
    if pairs is not None and work.mask is not None and not tile.full:
        visible = _visible(work.mask, pairs)
    added = summed_bias(method, q, pairs)
    if isinstance(method.normalise, Softmax) and method.score is None and not work.need_lse:
        return _sdpa_tile(q, k, v, added, visible, work.scale), None
    scores = group_scores(q * work.scale, k)
    scores = scores if added is None else scores + added
    if method.score is not None and pairs is not None:
        scores = method.score(scores, pairs.b, pairs.h, pairs.query_index, pairs.key_index)
    if visible is None:
        visible = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool, device=q.device)
    weights, lse = normalised(scores, visible, method.normalise, work.need_lse)
    return group_values(weights, v), lse


def _pairs(work: Work, tile: Tile, device: torch.device) -> Pairs:
    frame = work.frame
    keys = tile.keys
    if isinstance(keys, slice):
        keys = torch.arange(keys.start, keys.stop, device=device)
    return frame.at(
        torch.arange(frame.batch, device=device)[:, None, None, None],
        torch.arange(tile.heads.start, tile.heads.stop, device=device)[:, None, None],
        torch.arange(tile.rows.start, tile.rows.stop, device=device)[:, None],
        keys,
    )


def _visible(mask: Mask, pairs: Pairs) -> Tensor:
    found = mask.visible(pairs)
    return found[(None,) * (4 - found.ndim)]


def _sdpa_tile(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, visible: Tensor | None, scale: float
) -> Tensor:
    mask = visible
    if added is not None:
        mask = added.to(q.dtype).expand(-1, -1, q.shape[2], -1)
        mask = mask if visible is None else mask.masked_fill(~visible, float("-inf"))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )
