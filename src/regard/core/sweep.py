r"""The chunk form of the decayed recurrence, with its own backward.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t        g: None, (1,H,1,1) or (B,H,N,1)

Inside a block of c tokens the weights exp(g_{j+1} + … + g_i) q_i . k_j are a c x c matrix; what
came before enters through the state at the block's start. Backward keeps the inputs and the states
at the borders of groups of blocks and walks the groups in reverse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.core.fade import Group, carried, decay_gradient, groups


def sweep(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Outputs (B,H,N,E) and the last state (B,H,F,E), in blocks of `size` tokens.

    Without gradients, memory beyond inputs and outputs does not depend on N.
    """
    leaves = (q, k, v, state) if decay is None else (q, k, v, state, decay)
    if torch.is_grad_enabled() and any(x.requires_grad for x in leaves):
        return _Sweep.apply(q, k, v, decay, state, size)
    return _run(q, k, v, decay, state, size, None)


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        state: Tensor,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        borders: list[Tensor] = []
        out, state = _run(q, k, v, decay, state, size, borders)
        ctx.save_for_backward(q, k, v, decay, *borders)
        ctx.size = size
        return out, state

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        q, k, v, decay, *borders = ctx.saved_tensors
        do, ds = upstream
        totals = [torch.empty_like(x) for x in (q, k, v)]
        if ctx.needs_input_grad[3]:
            totals.append(q.new_empty(*q.shape[:3], 1))
        every = list(groups(k, max(k.shape[3], v.shape[3]), decay, ctx.size))
        for group, border in zip(reversed(every), reversed(borders), strict=True):
            parts = tuple(group.blocks(x) for x in (q, k, v, do))
            gradients, ds = _backward(parts, group, border, ds, len(totals) == 4)
            for total, gradient in zip(totals, gradients, strict=True):
                total[:, :, group.rows] = group.rejoined(gradient)
        dg = totals[3].sum_to_size(decay.shape) if len(totals) == 4 else None
        return *totals[:3], dg, ds, None


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    state: Tensor,
    size: int,
    borders: list[Tensor] | None,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    for group in groups(k, max(k.shape[3], v.shape[3]), decay, size):
        if borders is not None:
            borders.append(state)
        o, state = _forward(group.blocks(q), group.blocks(k), group.blocks(v), group, state)
        out[:, :, group.rows] = group.rejoined(o)
    return out, state


def _forward(q: Tensor, k: Tensor, v: Tensor, group: Group, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of a group's blocks and the state after it."""
    before, state = _states(k, v, group, state)
    weights = group.scaled_(k @ q.mT, group.fade.pairs)
    o = group.scaled_(q @ before, group.fade.since)
    return o.baddbmm_(weights.mT, v), state


def _states(k: Tensor, v: Tensor, group: Group, state: Tensor) -> tuple[Tensor, Tensor]:
    """States before each block, (B*H*G,F,E), and after the last."""
    written = k.mT @ group.scaled(v, group.fade.until)
    before, state = carried(written.unflatten(0, group.shape[:3]), group.fade.across, state)
    return before.flatten(0, 2), state


def _backward(
    parts: tuple[Tensor, ...], group: Group, border: Tensor, ds: Tensor, decays: bool
) -> tuple[list[Tensor], Tensor]:
    """Gradients of q, k, v (and the log decay, (·,c,1)) in a group's blocks, and of the state
    before it, from those of the outputs and of the state after it, ds.
    """
    q, k, v, do = parts
    fade = group.fade
    before, _ = _states(k, v, group, border)
    late = group.scaled(do, fade.since)
    after, ds = _costates(q.mT @ late, group, ds)
    weights, dweights = group.scaled_(k @ q.mT, fade.pairs), v @ do.mT
    dv = group.scaled_(k @ after, fade.until).baddbmm_(weights, do)
    products = dweights * weights if decays else dweights
    group.scaled_(dweights, fade.pairs)
    dq = late @ before.mT
    dk = group.scaled_(v @ after.mT, fade.until)
    dg = []
    if decays and fade.across is not None:
        kept = (group.scaled(before, fade.across) * after).sum((-2, -1))[:, None]
        dg = [decay_gradient(products, (q * dq).sum(-1), (k * dk).sum(-1), kept)[..., None]]
    return [dq.baddbmm_(dweights.mT, k), dk.baddbmm_(dweights, q), dv, *dg], ds


def _costates(read: Tensor, group: Group, ds: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the states after each block, (B*H*G,F,E), and of the one before the first."""
    read, across = read.unflatten(0, group.shape[:3]), group.fade.across
    after, ds = carried(read.flip(2), across if across is None else across.flip(2), ds)
    return after.flip(2).flatten(0, 2), ds
