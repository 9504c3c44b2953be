r"""Tiled executor: blocks of queries against their visible blocks of keys only, forward and
backward.

A tile is a block of query rows with every key any of them may see, so a row is always whole: any
normaliser works, two-pass ones included, and no N x M matrix is ever held. Blocks nobody sees are
never touched. Tiles of one shape are computed together: fewer, larger calls keep every thread busy.
Plain softmax goes through scaled_dot_product_attention, all else through two matrix products. The
backward pass computes each tile again, so that training needs no more memory than inference: it
keeps q, k, v and one unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import UnsupportedError
from regard.core.frame import Frame
from regard.core.stacked import Unit, add_keys, key_total, read_keys, read_queries, write
from regard.core.tiling import Stack
from regard.core.unit import COPIES, WORKSPACE, Work, output_of
from regard.core.weights import Scored

CALL = 8 * 2**20
"""Bytes that one fused call gathers, where it can choose: they stay in the cache."""
SCORES = 4 * CALL
"""Bytes of scores and weights that one call makes: fewer parallel regions, each of more work."""


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


def units(work: Work, k: Tensor, v: Tensor, batch: int) -> Iterator[Unit]:
    """Every tile of every row of the batch once, as many to a call as fit `CALL` or `SCORES`."""
    room = CALL if work.fused else SCORES
    room = room if k.device.type == "cpu" else WORKSPACE
    for whole in work.stacks:
        each = _cost(work, whole, k, v)
        hidden = 0 if whole.full or (work.by_distance and whole.diagonal) else whole.height
        hidden *= 4 * COPIES * (whole.partial.stop - whole.partial.start)
        most = whole.span if work.fused else room // each  # the fused kernel keeps no scores
        for stack in whole.in_heads(most, work.group):
            size = max(1, room // (each * stack.span + hidden))
            if stack.count >= batch:
                for row, start in product(range(batch), range(0, stack.count, size)):
                    yield Unit(slice(row, row + 1), stack.tiles(start, start + size))
            else:
                for tile, start in product(range(stack.count), range(0, batch, size)):
                    rows = slice(start, min(start + size, batch))
                    yield Unit(rows, stack.tiles(tile, tile + 1))


def _cost(work: Work, stack: Stack, k: Tensor, v: Tensor) -> int:
    """Bytes that one head of one tile makes or gathers."""
    rows = stack.height + (0 if stack.in_step else stack.width)
    numbers = rows * (k.shape[-1] + v.shape[-1])
    if not work.fused or work.method.key_bias is not None:
        numbers += 2 * stack.height * stack.width  # scores and weights
    return numbers * k.element_size()


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
        seen = sum(stack.count * stack.span * stack.height for stack in work.stacks)
        make = torch.empty if seen == q.shape[1] * q.shape[2] else torch.zeros
        out = make(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
        lse = q.new_full((*q.shape[:3], 1), float("-inf")) if work.need_lse else None
        for unit in units(work, k, v, q.shape[0]):
            part, part_lse = output_of(work, unit, *_pieces(work, unit, q, k, v, bias))
            write(out, unit, part)
            if lse is not None and part_lse is not None:
                write(lse, unit, part_lse[..., None])
        return out if lse is None else (out, lse[..., 0])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        work: Work = ctx.work
        q, k, v, *captures = ctx.saved_tensors
        bias: Tensor | None = ctx.bias
        sources = [k, v] if bias is None else [k, v, bias[..., None]]
        dq, totals = torch.zeros_like(q), [key_total(x, work.stacks) for x in sources]
        own = [torch.zeros_like(x) for x in captures]
        for unit in units(work, k, v, q.shape[0]):
            pieces = _pieces(work, unit, q, k, v, bias)
            leaves = [x.detach().requires_grad_() for x in pieces if x is not None]
            with torch.enable_grad():
                results = output_of(work, unit, *leaves, *([None] if bias is None else []))
            given = [read_queries(g if g.ndim == 4 else g[..., None], unit) for g in upstream]
            outputs = [r for r in results if r is not None]
            given = [g.reshape(r.shape) for g, r in zip(given, outputs, strict=True)]
            found = torch.autograd.grad(outputs, [*leaves, *captures], given, allow_unused=True)
            if found[0] is not None:
                write(dq, unit, found[0])
            for index, total in enumerate(totals):
                add_keys(total, unit, found[1 + index], 1 if index == 2 else work.group)
            for total, gradient in zip(own, found[len(leaves) :], strict=True):
                if gradient is not None:
                    total += gradient
        dk, dv, *dbias = (total[:, :, : k.shape[2]] for total in totals)
        return None, dq, dk, dv, dbias[0][..., 0] if dbias else None, *own


def _pieces(
    work: Work, unit: Unit, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    own = None if bias is None else read_keys(bias[..., None], unit, 1)
    keys, values = read_keys(k, unit, work.group), read_keys(v, unit, work.group)
    return read_queries(q, unit), keys, values, own
