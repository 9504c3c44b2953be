"""Reading the rows of a stack of tiles, as views wherever they lie at fixed steps, and bringing
results and gradients back.

A unit is a stack with one row of the batch, or one tile with several rows of the batch, so that its
pieces have four axes: (T or b, heads, rows, width).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.tiling import Stack


@dataclass(frozen=True, eq=False)
class Unit:
    """What one call computes: the tiles of `stack` for the rows `batch` of the batch."""

    batch: slice
    stack: Stack


def read_queries(x: Tensor, unit: Unit) -> Tensor:
    """The unit's rows of x (B,H,N,D)."""
    stack = unit.stack
    if stack.count == 1 or stack.in_step:
        return _view(x, unit, stack.heads[0], stack.span, stack.rows, stack.height)
    own = torch.arange(stack.height, device=x.device)
    rows = torch.tensor(stack.rows, device=x.device)[:, None] + own
    return _gather(x[unit.batch.start], stack.heads, stack.span, rows)


def read_keys(x: Tensor, unit: Unit, group: int) -> Tensor:
    """The rows that the unit's keys have in x (B,H_k,M,D), or in a bias (B or 1, H or 1, M, 1)."""
    stack = unit.stack
    heads, span = key_heads(stack, x, group)
    if isinstance(stack.keys, tuple):
        return _view(x, unit, heads[0], span, stack.keys, stack.width)
    index = stack.key_index(x.device)
    if stack.count > 1:
        return _gather(x[unit.batch.start if x.shape[0] > 1 else 0], heads, span, index)
    batch = unit.batch if x.shape[0] > 1 else slice(0, 1)
    return x[batch, heads[0] : heads[0] + span].index_select(2, index[0])


def key_heads(stack: Stack, x: Tensor, group: int) -> tuple[Sequence[int], int]:
    """First key head of each tile, and how many it reads, of x (·,H_k or 1,·,·)."""
    if x.shape[1] == 1:
        return (0,) * stack.count, 1
    return tuple(head // group for head in stack.heads), max(1, stack.span // group)


def write(total: Tensor, unit: Unit, part: Tensor) -> None:
    """Put a unit's results (T or b, span, height, ·) where its queries are in total (B,H,N,·)."""
    stack = unit.stack
    if stack.count == 1 or stack.in_step:
        _view(total, unit, stack.heads[0], stack.span, stack.rows, stack.height).copy_(part)
        return
    for head, row, own in zip(stack.heads, stack.rows, part, strict=True):
        total[unit.batch.start, head : head + stack.span, row : row + stack.height] = own


def key_total(x: Tensor, stacks: Sequence[Stack]) -> Tensor:
    """Zeros for gradients of x (B,H_k,M,D), M rounded up to whole blocks of keys."""
    block = stacks[0].block if stacks else 1
    length = -(-x.shape[2] // block) * block
    return x.new_zeros(*x.shape[:2], length, x.shape[3])


def add_keys(total: Tensor, unit: Unit, gradient: Tensor | None, group: int) -> None:
    """Add the gradient of what `read_keys` read, if there is one, to a `key_total`."""
    if gradient is None:
        return
    stack = unit.stack
    heads, span = key_heads(stack, total, group)
    if not isinstance(stack.keys, tuple):
        _add_blocks(total, unit, gradient, heads, span)
    elif stack.count == 1:
        view = _view(total, unit, heads[0], span, stack.keys, stack.width)
        view += gradient
    elif stack.keys[0] == stack.keys[1]:
        one = Unit(unit.batch, stack.tiles(0, 1))
        add_keys(total, one, gradient.sum(0, keepdim=True), group)
    else:
        step = stack.keys[1] - stack.keys[0]
        for offset in range(0, stack.width, step):
            piece = gradient[:, :, offset : offset + step]  # of all tiles: they do not overlap
            starts = [key + offset for key in stack.keys]
            view = _view(total, unit, heads[0], span, starts, piece.shape[2])
            view += piece


def _add_blocks(
    total: Tensor, unit: Unit, gradient: Tensor, heads: Sequence[int], span: int
) -> None:
    stack, size = unit.stack, unit.stack.block
    whole = F.pad(gradient, (0, 0, 0, -stack.width % size)).unflatten(2, (-1, size))
    batch = unit.batch if total.shape[0] > 1 else slice(0, 1)
    for tile, head in enumerate(heads):
        own = whole if stack.count == 1 else whole[tile : tile + 1]
        blocks = stack.key_blocks[tile].to(total.device)
        total[batch, head : head + span].unflatten(2, (-1, size)).index_add_(2, blocks, own)


def _view(
    x: Tensor, unit: Unit, head: int, span: int, starts: Sequence[int], length: int
) -> Tensor:
    """Runs of `length` rows of x that begin at `starts`, in fixed steps: (T or b, span, length, ·)
    without a copy.
    """
    heads = slice(head, head + span)
    batch = unit.batch if x.shape[0] > 1 else slice(0, 1)
    if len(starts) == 1:
        return x[batch, heads, starts[0] : starts[0] + length]
    step = starts[1] - starts[0]
    run = x[batch.start, heads, starts[0] : starts[-1] + length]
    if step == 0:
        return run.expand(len(starts), *run.shape)
    return run.unfold(1, length, step).permute(1, 0, 3, 2)


def _gather(x: Tensor, heads: Sequence[int], span: int, rows: Tensor) -> Tensor:
    """x (H,M,D) at heads (T) … + span-1 and rows (T,L): (T,span,L,D), in one pass."""
    strides, width = x.stride(), x.shape[2]
    if strides[2] != 1 or strides[0] % width or strides[1] % width:
        x = x.contiguous()
        strides = x.stride()
    by_head, by_row = strides[0] // width, strides[1] // width
    head = torch.tensor(heads, device=x.device)[:, None] + torch.arange(span, device=x.device)
    index = head[:, :, None] * by_head + rows[:, None] * by_row  # (T,span,L)
    size = (x.shape[0] - 1) * by_head + (x.shape[1] - 1) * by_row + 1
    table = x.as_strided((size, width), (width, 1))
    return table.index_select(0, index.flatten()).view(*index.shape, width)
