"""What a moment shows: the weights of one call, tile by tile, as the steps of a plan left them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from regard.core.cutting import given_mask, picked_heads
from regard.core.errors import UnsupportedError
from regard.core.mask import Given
from regard.core.model_scores import model_scored
from regard.core.moment import Moment, View
from regard.core.observe import Seen, observe


def observed(at: Moment) -> Iterator[Seen]:
    """The weights of a call, tile by tile, as the steps of a plan left them; nothing of heads that
    a step computes another way (`unseen`).

    Raises:
        UnsupportedError: keys were evicted, so that each head holds its own.
    """
    if not at.views:
        yield from _streamed(at)
        return
    shown = {head for view in at.views for head in view.heads}
    rest = View(tuple(h for h in at.heads if h not in shown), at)
    for view in (*at.views, rest):
        yield from _of_view(view)


def _of_view(view: View) -> Iterator[Seen]:
    """The weights of a view's heads, one after the other: they need not stand side by side."""
    at = view.at
    if at is None:
        return
    for head in view.heads:
        index, where = at.heads.index(head), slice(head, head + 1)
        if view.weights is None:
            for seen in _streamed(_alone(at, index)):
                yield replace(seen, heads=where)
        else:
            own = tile(view.weights[:, index : index + 1], causal=False)
            yield replace(own, heads=where, visible=picked_heads(at.seen(), [index]))


def unseen(at: Moment) -> tuple[int, ...]:
    """Heads that a step of a plan computes another way, so that they have no weights to show."""
    return tuple(head for view in at.views if view.at is None for head in view.heads)


def _streamed(at: Moment) -> Iterator[Seen]:
    if at.call is None:
        raise UnsupportedError("probe", "keys were evicted; probe the model without that plan")
    call = at.call.but(query_padding=at.query_real)
    yield from observe(at.q, at.k, call, model_scored(at))


def _alone(at: Moment, index: int) -> Moment:
    """One head of a moment."""
    key = index // at.group
    call, bias = at.call, at.bias
    part = replace(
        at,
        heads=at.heads[index : index + 1],
        q=at.q[:, index : index + 1],
        k=at.k[:, key : key + 1],
        v=at.v[:, key : key + 1],
        bias=None if bias is None else picked_heads(bias, [index]),
    )
    if call is not None and isinstance(call.mask, Given):
        part.call = call.but(mask=given_mask(picked_heads(at.seen(), [index])))
    return part


def tile(weights: Tensor, causal: bool = True) -> Seen:
    """Whole matrices (B,H,N,M) as one tile; if causal, the last query sees the last key."""
    b, h, n, m = weights.shape
    visible = torch.ones(1, 1, n, m, dtype=torch.bool, device=weights.device)
    visible = visible.tril(m - n) if causal else visible
    return Seen(slice(0, b), slice(0, h), slice(0, n), slice(0, m), weights, visible)
