"""Observers: the weights of a scored mechanism, tile by tile, for whoever wants to look at rows of
attention without an N x M matrix.

A tile holds whole rows, so that every normaliser, a two-pass one included, has seen each row before
it is handed out, in one sweep. What is longer than the workspace is cut into fewer rows, sequences
and heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.boundary import check_qkv
from regard.core.call import Call
from regard.core.errors import ArgumentError
from regard.core.scored import all_real, without_padding
from regard.core.stacked import Unit, read_keys, read_queries
from regard.core.unit import COPIES, WORKSPACE, Work, visible_columns, weights_of
from regard.core.weights import Scored, scale_of

CHUNK = 2**17
"""Weights that pass through the processor's cache at a time."""
RUN = 32
"""Keys whose weights are summed before sums of growing length are made of them."""


@dataclass(frozen=True, eq=False)
class Seen:
    """Weights (b,h,n,m) of the queries `rows`, for these sequences and heads, on `keys` (a slice or
    row indices); their weights on all other keys are zero. visible (b or 1, h or 1, n, m): which of
    these keys each query may see, nothing where the query is padding.

    What several readings ask of a tile is computed once, when first asked for.
    """

    batch: slice
    heads: slice
    rows: slice
    keys: slice | Tensor
    weights: Tensor
    visible: Tensor

    @cached_property
    def mass(self) -> Tensor:
        """What each key gets from these queries, (b,h,m)."""
        return self.weights.sum(-2)

    @cached_property
    def logs(self) -> tuple[Tensor, Tensor]:
        """Sums of w ln w over keys (b,h,n), minus a query's entropy in nats, and over queries
        (b,h,m); made of a few rows at a time, which stay in the processor's cache.
        """
        tiny, rows = torch.finfo(self.weights.dtype).tiny, []
        columns = torch.zeros_like(self.mass)
        size = max(1, CHUNK * self.weights.shape[2] // max(1, self.weights.numel()))
        for part in self.weights.split(size, 2):
            terms = part.clamp_min(tiny).log_().mul_(part)
            rows.append(terms.sum(-1))
            columns += terms.sum(-2)
        return torch.cat(rows, -1), columns

    @cached_property
    def runs(self) -> Tensor:
        """Weight of the tile's first 0, RUN, 2 RUN, … keys, (b,h,n,1 + m // RUN)."""
        count = self.weights.shape[-1] // RUN
        sums = self.weights[..., : count * RUN].unflatten(-1, (count, RUN)).sum(-1)
        return F.pad(sums.cumsum(-1), (1, 0))

    @cached_property
    def viewers(self) -> Tensor:
        """How many of these queries see each key, (b or 1, h or 1, m)."""
        return self.visible.sum(-2)

    @cached_property
    def in_view(self) -> Tensor:
        """How many of these keys each query sees, (b or 1, h or 1, n)."""
        return self.visible.sum(-1)


@torch.no_grad()
def observe(
    q: Tensor, k: Tensor, call: Call, method: Scored, *, workspace: int = WORKSPACE
) -> Iterator[Seen]:
    """Weights of q (B,H,N,D) on k (B,H_k,M,D), without gradients, in no particular order.

    Every row of every head comes at most once; one that does not come has only zeros. No tile needs
    more than `workspace` bytes, its weights a small part of them.

    Raises:
        ArgumentError: shapes, dtypes or call fields that do not fit; a workspace too small for one
            row.
    """
    check_qkv(q, k, k, call)
    q, k, _ = without_padding(q, k, k, call)
    if call.query_padding is not None and all_real(call.query_padding):
        call = call.but(query_padding=None)
    group = q.shape[1] // k.shape[1]
    scale = scale_of(call, method.scale, q.shape[-1])
    mask = call.visibility(method.mask)
    work = Work.of(call.frame(q, k), mask, method, scale, False, group, workspace)
    bias = None if method.key_bias is None else method.key_bias[..., None]
    for unit in _units(work, q.shape[0], workspace):
        own = None if bias is None else read_keys(bias, unit, 1)
        keys = read_keys(k, unit, group)
        weights, _ = weights_of(work, unit, read_queries(q, unit), keys, own)
        yield _seen(unit, weights, visible_columns(work, unit, q.device), call)


def _units(work: Work, batch: int, workspace: int) -> Iterator[Unit]:
    """One tile at a time, for as many sequences and heads as fit."""
    for stack in work.stacks:
        most = workspace // (4 * COPIES * stack.height * stack.width)
        if not most:
            least = 4 * COPIES * stack.width
            raise ArgumentError("workspace", f"at least {least} bytes, for one row", workspace)
        for part in stack.in_heads(most, work.group):
            size = max(1, most // part.span)
            for tile in range(part.count):
                for start in range(0, batch, size):
                    rows = slice(start, min(start + size, batch))
                    yield Unit(rows, part.tiles(tile, tile + 1))


def _seen(unit: Unit, weights: Tensor, visible: Tensor, call: Call) -> Seen:
    """The tile of a unit; weights of half precision become single, so that sums over them hold."""
    stack = unit.stack
    heads = slice(stack.heads[0], stack.heads[0] + stack.span)
    rows = slice(stack.rows[0], stack.rows[0] + stack.height)
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    visible = visible.expand(-1, -1, *weights.shape[2:])
    if call.query_padding is not None:
        real = call.query_padding[unit.batch, None, rows, None]
        weights, visible = weights * real, visible & real
    if isinstance(stack.keys, tuple):
        keys: slice | Tensor = slice(stack.keys[0], stack.keys[0] + stack.width)
    else:
        keys = stack.key_index(weights.device)[0]
    return Seen(unit.batch, heads, rows, keys, weights, visible)
