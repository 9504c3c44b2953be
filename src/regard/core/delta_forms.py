r"""Forms of the delta rule: a loop of steps, and triangular systems inside blocks.

    S_t = e^{g_t} (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t

q, k (B,H,N,F), v (B,H,N,E), beta (B,H,N,1), state S (B,H,F,E); g (B,H,N,1), (1,H,1,1) or None. In a
block of c tokens that starts with S the corrections x_i, the values that are really written, solve

    x_i + sum_{j<i} beta_i e^{G_i - G_j} (k_i . k_j) x_j = beta_i (v_i - e^{G_i} S^T k_i)

(G_i = g_1 + … + g_i; differences as in `regard.core.fade`) and are then summed as the values of
linear attention (`regard.core.sweep`). Backward keeps the inputs and the states at the borders of
groups of blocks, and walks the groups in reverse.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.core.fade import Group, decay_gradient, groups


def delta_scan(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """A loop of steps: the recurrence as it is written."""
    rows = []
    steady = decay is None or decay.shape[2] == 1
    for t in range(q.shape[2]):
        if decay is not None:
            state = state * decay[:, :, 0 if steady else t, :, None].exp()
        key = k[:, :, t, :, None]
        missing = v[:, :, t, None] - key.mT @ state  # what the state does not answer yet
        state = state + key * (beta[:, :, t, None] * missing)
        rows.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(rows, 2), state


def delta_step_(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token (B,H,1,·) like the other forms, its state overwritten; not for gradients."""
    if decay is not None:
        state.mul_(decay[:, :, 0, :, None].exp())
    state.addcmul_(k.mT, beta * (v - k @ state))
    return q @ state, state


def delta_chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, state: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Triangular systems in blocks of `size` tokens, the state carried between blocks.

    Without gradients, memory beyond inputs and outputs does not depend on N.
    """
    leaves = (q, k, v, beta, state) if decay is None else (q, k, v, beta, state, decay)
    if torch.is_grad_enabled() and any(x.requires_grad for x in leaves):
        return _Delta.apply(q, k, v, beta, decay, state, size)
    return _run((q, k, v, beta), decay, state, size, None)


class Blocks(NamedTuple):
    """A group's blocks, (B*H*G,c,·)."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor


class Solved(NamedTuple):
    """What a group's blocks write: the triangular system (n,c,c) as (key, query), of which the part
    above the diagonal counts; corrections x (n,c,E); states before each block (n,F,E) and after the
    last.
    """

    system: Tensor
    x: Tensor
    before: Tensor
    after: Tensor


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        decay: Tensor | None,
        state: Tensor,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        borders: list[Tensor] = []
        out, state = _run((q, k, v, beta), decay, state, size, borders)
        ctx.save_for_backward(q, k, v, beta, decay, *borders)
        ctx.size = size
        return out, state

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        q, k, v, beta, decay, *borders = ctx.saved_tensors
        do, ds = upstream
        totals = [torch.empty_like(x) for x in (q, k, v, beta)]
        if ctx.needs_input_grad[4]:
            totals.append(torch.empty_like(beta))
        every = list(groups(k, max(k.shape[3], v.shape[3]), decay, ctx.size))
        for group, border in zip(reversed(every), reversed(borders), strict=True):
            parts = Blocks(*(group.blocks(x) for x in (q, k, v, beta)))
            gradients, ds = _backward(parts, group.blocks(do), group, border, ds)
            for total, gradient in zip(totals, gradients, strict=False):
                total[:, :, group.rows] = group.rejoined(gradient)
        dg = totals[4].sum_to_size(decay.shape) if len(totals) == 5 else None
        return *totals[:4], dg, ds, None


def _run(
    sources: tuple[Tensor, ...],
    decay: Tensor | None,
    state: Tensor,
    size: int,
    borders: list[Tensor] | None,
) -> tuple[Tensor, Tensor]:
    q, k, v, _ = sources
    out = q.new_empty(*q.shape[:3], v.shape[3])
    for group in groups(k, max(k.shape[3], v.shape[3]), decay, size):
        if borders is not None:
            borders.append(state)
        part = Blocks(*(group.blocks(x) for x in sources))
        solved = _solved(part, group, state)
        weights = group.scaled_(part.k @ part.q.mT, group.fade.pairs)
        o = group.scaled_(part.q @ solved.before, group.fade.since)
        out[:, :, group.rows] = group.rejoined(o.baddbmm_(weights.mT, solved.x))
        state = solved.after
    return out, state


def _solved(part: Blocks, group: Group, state: Tensor) -> Solved:
    fade, (batch, heads, blocks, _) = group.fade, group.shape
    system = group.scaled_(part.k @ (part.k * part.beta).mT, fade.pairs)
    target = group.apart(part.v * part.beta)
    read = group.apart(group.scaled_(part.k * part.beta, fade.since))
    write = group.apart(group.scaled(part.k, fade.until)).mT
    across, systems = group.across(), group.apart(system)
    x, state = torch.empty_like(target), state.flatten(0, 1)
    states = state.new_empty(batch * heads, blocks + 1, *state.shape[1:])
    states[:, 0] = state
    for block in range(blocks):
        state, after = states[:, block], states[:, block + 1]
        right = target[:, block].baddbmm_(read[:, block], state, alpha=-1)
        x[:, block] = torch.linalg.solve_triangular(
            systems[:, block], right.mT, upper=True, left=False, unitriangular=True
        ).mT
        after.copy_(state)
        if across is not None:
            after.mul_(across[:, block])
        after.baddbmm_(write[:, block], x[:, block])
    last = states[:, blocks].unflatten(0, (batch, heads))
    return Solved(system, x.flatten(0, 1), states[:, :blocks].flatten(0, 1), last.clone())


def _backward(
    part: Blocks, do: Tensor, group: Group, border: Tensor, ds: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Gradients of q, k, v, beta and the log decay in a group's blocks, and of the state before
    it, from those of the outputs and of the state after it, ds.
    """
    fade, (q, k, v, beta) = group.fade, part
    solved = _solved(part, group, border)
    weights = group.scaled_(k @ q.mT, fade.pairs)
    late = group.scaled(do, fade.since)
    dright, after, ds = _costates(part, group, solved.system, weights @ do, q.mT @ late, ds)
    back = group.scaled(dright * beta, fade.since)  # reaches the state at the block's start
    dweights, dsystem = solved.x @ do.mT, (solved.x @ dright.mT).neg_().triu_(1)
    products = (dweights * weights).addcmul_(dsystem, solved.system)
    group.scaled_(dweights, fade.pairs)
    group.scaled_(dsystem, fade.pairs)
    inner = dsystem.mT @ k  # gradient of beta k in the system
    answer = group.scaled_(k @ solved.before, fade.since)
    dbeta = (inner * k).sum(-1, keepdim=True) + (dright * (v - answer)).sum(-1, keepdim=True)
    dq, dk = late @ solved.before.mT, (back @ solved.before.mT).neg_()
    written = group.scaled_(solved.x @ after.mT, fade.until)
    dg = []
    if fade.across is not None:
        reads = (q * dq).sum(-1) + (k * dk).sum(-1)
        kept = (group.scaled(solved.before, fade.across) * after).sum((-2, -1))[:, None]
        dg = [decay_gradient(products, reads, (k * written).sum(-1), kept)[..., None]]
    dk += written + beta * inner
    dk.baddbmm_(dweights, q).baddbmm_(dsystem, k * beta)
    return [dq.baddbmm_(dweights.mT, k), dk, dright * beta, dbeta, *dg], ds


def _costates(
    part: Blocks, group: Group, system: Tensor, dx: Tensor, read: Tensor, ds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the systems' right sides (n,c,E), of the states after each block (n,F,E) and of
    the state before the first, from those of the corrections' use as values, dx, and of the states'
    reading by queries, read.
    """
    fade, (batch, heads, blocks, _) = group.fade, group.shape
    write = group.apart(group.scaled(part.k, fade.until))
    back = group.apart(group.scaled(part.k * part.beta, fade.since)).mT
    dx, read, system = group.apart(dx), group.apart(read), group.apart(system)
    across, ds = group.across(), ds.flatten(0, 1)
    dright, after = torch.empty_like(dx), torch.empty_like(read)
    for block in reversed(range(blocks)):
        after[:, block] = ds
        total = torch.baddbmm(dx[:, block], write[:, block], ds)
        dright[:, block] = torch.linalg.solve_triangular(
            system[:, block], total, upper=True, unitriangular=True
        )
        kept = ds if across is None else ds * across[:, block]
        ds = torch.baddbmm(kept + read[:, block], back[:, block], dright[:, block], alpha=-1)
    return dright.flatten(0, 1), after.flatten(0, 1), ds.unflatten(0, (batch, heads))
