r"""Forms of the decayed recurrence: three ways to compute the same outputs and the same last state.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

`scan` is a loop of steps, `parallel` the quadratic definition, `chunked` matmuls inside blocks with
a state between them. q, k (B,H,N,F), v (B,H,N,E), state (B,H,F,E); the log decay g <= 0 is
(B,H,N,F), (B,H,N,1), (1,H,1,1) where it is the same for all tokens, or None. Sums of g run over the
tokens between a key and its query and are never differences of running totals, so no exponent is
ever positive, small gaps keep their digits beside large ones, and g = -inf forgets everything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.core.fade import spans
from regard.core.sweep import sweep


def step(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: q, k (B,H,F), v (B,H,E), decay (B,H,1 or F), state (B,H,F,E)."""
    if decay is not None:
        state = state * decay.exp()[..., None]
    state = state + k[..., None] * v[..., None, :]
    return (q[..., None, :] @ state)[..., 0, :], state


def step_(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token (B,H,1,·) like the other forms, its state overwritten; not for gradients."""
    if decay is not None:
        state.mul_(decay[:, :, 0, :, None].exp())
    state.addcmul_(k.mT, v)
    return q @ state, state


def scan(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """A loop of steps: the recurrence as it is written."""
    rows = []
    steady = decay is None or decay.shape[2] == 1
    for t in range(q.shape[2]):
        forget = None if decay is None else decay[:, :, 0 if steady else t]
        o, state = step(q[:, :, t], k[:, :, t], v[:, :, t], forget, state)
        rows.append(o)
    return torch.stack(rows, 2), state


def parallel(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The quadratic definition: weights exp(g_{j+1} + … + g_i) q_i . k_j for j <= i."""
    if decay is None:
        return (q @ k.mT).tril() @ v + q @ state, k.mT @ v + state
    decay = decay.expand(-1, -1, q.shape[2], -1)
    if decay.shape[-1] == 1:
        weights = (k @ q.mT) * gaps(decay[..., 0]).exp()  # (B, H, key, query)
    else:
        weights = torch.einsum("bhif,bhjf,bhfji->bhji", q, k, gaps(decay.mT).exp())
    since = decay.cumsum(2).exp()  # of what the state held before the first token
    after = (k * _until_end(decay).exp()).mT @ v + state * since[:, :, -1, :, None]
    return weights.mT @ v + (q * since) @ state, after


def chunked(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Matmuls inside blocks of `size` tokens, the state carried between blocks; linear in N."""
    if decay is None or decay.shape[-1] == 1:
        return sweep(q, k, v, decay, state, size)
    every, outputs = list(spans(k, max(k.shape[3], v.shape[3]), size)), []
    train = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, decay, state))
    for rows, length in every:
        parts = (q[:, :, rows], k[:, :, rows], v[:, :, rows], decay[:, :, rows], state, length)
        if train and len(every) > 1:  # keep the parts only, compute the blocks again in backward
            o, state = checkpoint(_blocks, *parts, use_reentrant=False, preserve_rng_state=False)
        else:
            o, state = _blocks(*parts)
        outputs.append(o)
    return torch.cat(outputs, 2), state


def _blocks(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """A group of blocks with a decay per channel (B,H,N,F)."""
    q, k, v, decay = (x.unflatten(2, (-1, size)) for x in (q, k, v, decay))  # (B, H, N/c, c, ·)
    since = decay.cumsum(3).exp()
    o = _inside(q, k, v, decay)
    written, before = (k * _until_end(decay).exp()).mT @ v, []
    for block, kept in enumerate(since[:, :, :, -1].unbind(2)):
        before.append(state)
        state = state * kept[..., None] + written[:, :, block]
    return (o + (q * since) @ torch.stack(before, 2)).flatten(2, 3), state


def _inside(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """Causal decayed outputs inside blocks, (B,H,N/c,c,F) -> (B,H,N/c,c,E)."""
    size, half = q.shape[3], 1
    fringe = (1 << (size - 1).bit_length()) - size
    q, k, v, decay = (F.pad(x, (0, 0, 0, fringe)) for x in (q, k, v, decay))
    o = (q * k).sum(-1, keepdim=True) * v
    while half < size:  # queries of every right half read keys of its left half, across one border
        (_, q_right), (k_left, _), (v_left, _), (decay_left, decay_right) = (
            x.unflatten(3, (-1, 2, half)).unbind(4) for x in (q, k, v, decay)
        )
        late, early = q_right * decay_right.cumsum(4).exp(), k_left * _until_end(decay_left).exp()
        o = o + F.pad((late @ early.mT) @ v_left, (0, 0, half, 0)).flatten(3, 4)
        half *= 2
    return o[:, :, :, :size]


def gaps(decay: Tensor) -> Tensor:
    """Log decay (…,c) -> what separates key j from query i, g_{j+1} + … + g_i, as (…,j,i); -inf for
    keys after the query.
    """
    rows = torch.arange(decay.shape[-1], device=decay.device)
    key, query = rows[:, None], rows
    steps = decay[..., None, :].expand(*decay.shape, len(rows)).masked_fill(query <= key, 0.0)
    return steps.cumsum(-1).masked_fill(query < key, float("-inf"))


def _until_end(decay: Tensor) -> Tensor:
    """Log decay (…,c,F) -> the sum over all later tokens of the block, (…,c,F)."""
    return F.pad(decay[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)
