"""One unit of tiled work: which of its pairs are visible, its weights and its output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.frame import Frame, Pairs
from regard.core.mask import Mask
from regard.core.stacked import Unit
from regard.core.tiling import BLOCK, Stack, plan_tiles
from regard.core.weights import Additive, Scored, Softmax, group_scores, group_values, normalised

WORKSPACE = 256 * 2**20
COPIES = 8
"""Numbers of four bytes that a pair may need at a time: scores, weights, visibility, positions."""


@dataclass(frozen=True, eq=False)
class Work:
    """Everything a unit needs besides q, k and v. group: query heads per key and value head.
    by_distance: visibility depends on the difference of two rows of the tensors alone.
    """

    frame: Frame
    mask: Mask | None
    method: Scored
    scale: float
    need_lse: bool
    group: int
    stacks: Sequence[Stack]
    by_distance: bool

    @staticmethod
    def of(
        frame: Frame,
        mask: Mask | None,
        method: Scored,
        scale: float,
        need_lse: bool,
        group: int,
        workspace: int = WORKSPACE,
    ) -> Work:
        """The work of a call, in tiles that fit the workspace."""
        stacks = plan_tiles(frame, mask, BLOCK, group)
        block = fitted_block(stacks, workspace)
        if block < BLOCK:
            stacks = plan_tiles(frame, mask, block, group)
        by_distance = mask is not None and mask.by_distance and frame.consecutive
        return Work(frame, mask, method, scale, need_lse, group, stacks, by_distance)

    @property
    def fused(self) -> bool:
        """Whether scaled_dot_product_attention computes its units."""
        method = self.method
        plain = method.score is None and method.block_bias is None and not self.need_lse
        return plain and isinstance(method.normalise, Softmax)


def fitted_block(stacks: Sequence[Stack], workspace: int) -> int:
    """Query rows per tile, so that the widest tile of one head fits the workspace."""
    widest = max((stack.width for stack in stacks), default=1)
    block = BLOCK
    while block > max(1, workspace // (4 * COPIES * widest)):
        block //= 2
    return block


def output_of(
    work: Work, unit: Unit, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Output of a unit from its pieces, and its lse on request; bias (·,·,m,1) is the key bias."""
    if work.fused:
        mask = _sdpa_mask(work, unit, q, bias)
        grouped = k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=work.scale, enable_gqa=grouped
        ), None
    weights, lse = weights_of(work, unit, q, k, bias)
    return group_values(weights, v), lse


def weights_of(
    work: Work, unit: Unit, q: Tensor, k: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weights (·,span,n,m) of a unit, and its lse on request."""
    method = work.method
    scores = group_scores(q * work.scale, k)
    if bias is not None:
        scores = scores.add_(bias.mT)
    if method.block_bias is not None:
        first, values = method.block_bias(q, pairs_of(work.frame, unit))
        scores[..., first : first + values.shape[-1]] += values
    if method.score is not None:
        pairs = pairs_of(work.frame, unit)
        scores = method.score(scores, pairs.b, pairs.h, pairs.query_index, pairs.key_index)
    visible = visible_of(work, unit)
    if isinstance(method.normalise, Softmax) and method.score is None and not work.need_lse:
        return _softmax_(scores, visible, unit.stack), None
    if method.normalise.kind == "additive" and not work.need_lse:
        rule = cast(Additive, method.normalise)
        return _additive(scores, visible, unit.stack, rule), None
    every = _whole(visible, unit.stack)
    if every is None:
        every = torch.ones(1, 1, 1, unit.stack.width, dtype=torch.bool, device=q.device)
    return normalised(scores, every, method.normalise, work.need_lse)


def _additive(scores: Tensor, visible: Tensor | None, stack: Stack, rule: Additive) -> Tensor:
    """Weights that each key has by itself; again only the partial columns are masked."""
    count = torch.full((1, 1, 1, 1), stack.width, device=scores.device)
    if visible is not None:
        count = count - (~visible).sum(-1, keepdim=True)
    weights = rule(scores, None, count)
    if visible is None:
        return weights
    if not torch.is_grad_enabled():
        weights[..., stack.partial].masked_fill_(~visible, 0.0)
        return weights
    return weights.masked_fill(~_every(visible, stack), 0.0)


def _softmax_(scores: Tensor, visible: Tensor | None, stack: Stack) -> Tensor:
    """Softmax of scores, which are overwritten; only the columns that someone may not see are
    masked.
    """
    if visible is not None:
        scores[..., stack.partial].masked_fill_(~visible, float("-inf"))
    weights = torch.softmax(scores, -1, out=None if torch.is_grad_enabled() else scores)
    if visible is None or visible.shape[-1] < stack.width:
        return weights  # every row sees the other columns
    return weights.masked_fill(~visible.any(-1, keepdim=True), 0.0)


def visible_of(work: Work, unit: Unit) -> Tensor | None:
    """Visibility of the partial columns of a unit, broadcastable to (·,span,n,w); None where
    everything is visible.
    """
    stack = unit.stack
    if work.mask is None or stack.full:
        return None
    if stack.count > 1 and work.by_distance and stack.diagonal:
        unit = Unit(unit.batch, stack.tiles(0, 1))
    found = work.mask.visible(pairs_of(work.frame, unit, stack.partial))
    return found[(None,) * (4 - found.ndim)]


def visible_columns(work: Work, unit: Unit, device: torch.device) -> Tensor:
    """Visibility of every column of a unit, broadcastable to (·,span,n,m)."""
    visible = visible_of(work, unit)
    if visible is None:
        shape = 1, 1, unit.stack.height, unit.stack.width
        return torch.ones(shape, dtype=torch.bool, device=device)
    return _every(visible, unit.stack)


def pairs_of(frame: Frame, unit: Unit, columns: slice = slice(None)) -> Pairs:
    """The pairs of a unit, for some of its columns."""
    stack, device = unit.stack, frame.key_positions.device
    heads = torch.arange(stack.span, device=device)[:, None, None]
    rows = torch.arange(stack.height, device=device)[:, None]
    keys = stack.key_index(device)[:, columns]
    if stack.count == 1:
        heads, rows, keys = heads + stack.heads[0], rows + stack.rows[0], keys[0]
    else:
        first = torch.tensor([stack.heads, stack.rows], device=device)[..., None, None, None]
        heads = heads + first[0] if len(set(stack.heads)) > 1 else heads + stack.heads[0]
        rows, keys = rows + first[1], keys[:, None, None]
    batch = torch.arange(unit.batch.start, unit.batch.stop, device=device)
    return frame.at(batch[:, None, None, None], heads, rows, keys)


def _whole(visible: Tensor | None, stack: Stack) -> Tensor | None:
    """Visibility of every column."""
    return visible if visible is None else _every(visible, stack)


def _every(visible: Tensor, stack: Stack) -> Tensor:
    if visible.shape[-1] == stack.width:
        return visible
    every = visible.new_ones(*visible.shape[:-1], stack.width)
    every[..., stack.partial] = visible
    return every


def _sdpa_mask(work: Work, unit: Unit, q: Tensor, bias: Tensor | None) -> Tensor | None:
    """What hides and shifts scores inside scaled_dot_product_attention."""
    visible = _whole(visible_of(work, unit), unit.stack)
    if bias is None:
        return None if visible is None else visible.expand(-1, -1, q.shape[2], -1)
    added = bias.mT.to(q.dtype).expand(-1, -1, q.shape[2], -1)
    return added if visible is None else added.masked_fill(~visible, float("-inf"))
