r"""Layer similarity: how little a sub-layer turns the residual stream, and which ones to drop.

    S = 1 - mean_t cos(x_t, y_t)        x: the stream before the sub-layer, y: after it, (B,N,C)

A sub-layer with S = 0 does nothing. The cosine is taken token by token and then averaged over real
tokens. The most similar ones are dropped in one shot, from one list or from several together
(attention and feed-forward), or one at a time with a new measurement after each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.errors import ArgumentError

Drops = tuple[tuple[str, int], ...]
"""Sub-layers: the name of their list (attention, mlp), and their number in it."""


def similarity(before: Tensor, after: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean cosine of two streams (B,N,C) over real tokens, real (B,N); a scalar."""
    if real is None:
        real = torch.ones(before.shape[:2], dtype=torch.bool, device=before.device)
    count = real.sum(-1)
    each = similarity_by_sequence(before, after, real)
    return (each * count).sum() / count.sum().clamp_min(1)


def similarity_by_sequence(before: Tensor, after: Tensor, real: Tensor) -> Tensor:
    """Mean cosine (B,) of two streams (B,N,C) over each sequence's real tokens (B,N)."""
    cosine = F.cosine_similarity(before, after, dim=-1)
    return cosine.masked_fill(~real, 0.0).sum(-1) / real.sum(-1).clamp_min(1)


def similarities(stream: Sequence[Tensor], real: Tensor | None = None) -> Tensor:
    """Similarity of each state of the residual stream (B,N,C) with the next, one number less than
    states. The hidden states of a forward give whole blocks (mind that many models return the last
    one after their final norm).

    Raises:
        ArgumentError: fewer than two states.
    """
    if len(stream) < 2:
        raise ArgumentError("stream", "two states or more", len(stream))
    return torch.stack([similarity(x, y, real) for x, y in pairwise(stream)])


def dropped(measured: Mapping[str, Tensor], count: int) -> Drops:
    """The `count` most similar sub-layers of all lists together, in one shot, in the order of their
    similarity (equal ones: as listed).

    Raises:
        ArgumentError: more than there are.
    """
    ranks = [(-float(s), name, i) for name, list_ in measured.items() for i, s in enumerate(list_)]
    if not 0 <= count <= len(ranks):
        raise ArgumentError("count", f"0 to {len(ranks)} sub-layers", count)
    ranks.sort(key=lambda rank: rank[0])
    return tuple((name, i) for _, name, i in ranks[:count])


def dropped_in_turn(measure: Callable[[Drops], Mapping[str, Tensor]], count: int) -> Drops:
    """As `dropped`, one at a time: `measure` is asked again after each drop, with those so far."""
    gone: Drops = ()
    for _ in range(count):
        measured = {name: x.clone() for name, x in measure(gone).items()}
        for name, index in gone:
            measured[name][index] = -torch.inf
        gone = (*gone, *dropped(measured, 1))
    return gone
