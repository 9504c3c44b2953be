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


def step(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: q, k (B,H,F), v (B,H,E), decay (B,H,1 or F), state (B,H,F,E)."""
    if decay is not None:
        state = state * decay.exp()[..., None]
    state = state + k[..., None] * v[..., None, :]
    return (q[..., None, :] @ state)[..., 0, :], state


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
    n = q.shape[2]
    whole = n - n % size
    if 0 < whole < n:
        outputs = []
        for part in (slice(0, whole), slice(whole, n)):
            own = decay if decay is None or decay.shape[2] == 1 else decay[:, :, part]
            o, state = chunked(q[:, :, part], k[:, :, part], v[:, :, part], own, state, size)
            outputs.append(o)
        return torch.cat(outputs, 2), state
    size = min(size, n)
    q, k, v = (x.unflatten(2, (-1, size)) for x in (q, k, v))  # (B, H, N/c, c, ·)
    kept = None
    if decay is None:
        o = (q @ k.mT).tril() @ v
    else:
        decay = decay[:, :, None] if decay.shape[2] == 1 else decay.unflatten(2, (-1, size))
        decay = decay.expand(-1, -1, -1, size, -1)
        o = _inside(q, k, v, decay)
        since = decay.cumsum(3).exp()
        q, k, kept = q * since, k * _until_end(decay).exp(), since[:, :, :, -1, :, None]
    before, state = _carried(state, k.mT @ v, kept)
    return (o + q @ before).flatten(2, 3), state


def _carried(state: Tensor, written: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """States before each block, (B,H,N/c,F,E), and after the last, from what each block writes."""
    before = []
    for block in range(written.shape[2]):
        before.append(state)
        if kept is not None:
            state = state * kept[:, :, 0 if kept.shape[2] == 1 else block]
        state = state + written[:, :, block]
    return torch.stack(before, 2), state


def _inside(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """Causal decayed outputs inside blocks, (B,H,N/c,c,F) -> (B,H,N/c,c,E)."""
    if decay.shape[-1] == 1:
        return ((k @ q.mT) * gaps(decay[..., 0]).exp()).mT @ v
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
