r"""Selected family: tiles of keys are ranked by importance, the best under a budget are kept, an
inner scored rule runs on them.

    C_t = top-w { importance_tc : tile c holds a key visible to tile t }        o_i = inner(q_i,
    keys of C_t(i))

Two executors: `masked` scores every pair and hides what was not chosen (the truth), `gathered`
reads only chosen keys. Ties go to the later key, so that the choice is the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.errors import ArgumentError
from regard.core.mask import Mask, Pairs
from regard.core.scored import (
    Scored,
    attend,
    modified_scores,
    normalised,
    repeat_heads,
    scale_of,
    without_padding,
)


@dataclass(frozen=True, eq=False)
class Selected:
    """One selecting mechanism, as data.

    importance: (B or 1, H or 1, T, C) for T tiles of `query_tile` queries and C tiles of `key_tile`
    keys (T = 1: one ranking for all queries). keep: tiles kept per query tile. inner: what runs on
    the kept keys.
    """

    importance: Tensor
    keep: int
    query_tile: int = 1
    key_tile: int = 1
    inner: Scored = field(default_factory=lambda: Scored())  # a class stops dynamo


@dataclass(frozen=True)
class Choice:
    """Chosen tiles: `index` (B,H,T,w) and `valid` (same shape), False where fewer than w tiles were
    visible.
    """

    index: Tensor
    valid: Tensor


def choose(importance: Tensor, allowed: Tensor, keep: int) -> Choice:
    """The `keep` most important allowed tiles per row of (…,T,C); ties go to the later tile."""
    if keep < 1:
        raise ArgumentError("keep", "at least 1", keep)
    keep = min(keep, importance.shape[-1])
    ranked = importance.masked_fill(~allowed, float("-inf")).flip(-1)
    order = ranked.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    index = importance.shape[-1] - 1 - order
    return Choice(index, allowed.expand_as(ranked).gather(-1, index))


@dataclass(frozen=True, eq=False)
class _Chosen(Mask):
    """Visible where the key's tile was chosen for the query's tile."""

    tiles: Tensor
    query_tile: int
    key_tile: int

    def visible(self, pairs: Pairs) -> Tensor:
        b = pairs.b if self.tiles.shape[0] > 1 else torch.zeros_like(pairs.b)
        h = pairs.h if self.tiles.shape[1] > 1 else torch.zeros_like(pairs.h)
        return self.tiles[
            b, h, pairs.query_index // self.query_tile, pairs.key_index // self.key_tile
        ]


def select(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    method: Selected,
    *,
    impl: Literal["masked", "gathered"] = "masked",
) -> Result:
    """Run a selecting mechanism on q (B,H,N,D), k (B,H_k,M,D), v (B,H_v,M,E).

    Raises:
        ArgumentError: tiles that do not divide N or M, or an importance of the wrong shape.
    """
    check_qkv(q, k, v, call)
    tiles = (q.shape[2] // method.query_tile, k.shape[2] // method.key_tile)
    if q.shape[2] % method.query_tile or k.shape[2] % method.key_tile:
        raise ArgumentError(
            "tiles", "tile sizes that divide the lengths", (method.query_tile, method.key_tile)
        )
    importance = method.importance.expand(-1, -1, tiles[0], tiles[1])
    choice = choose(importance, _allowed(q, k, call, method), method.keep)
    if impl == "gathered":
        return _gathered(q, k, v, call, method, choice)
    if impl != "masked":
        raise ArgumentError("impl", "'masked' or 'gathered'", impl)
    chosen = torch.zeros(*choice.index.shape[:-1], tiles[1], dtype=torch.bool, device=q.device)
    chosen = chosen.scatter(-1, choice.index, choice.valid)
    call_chosen = call.but(
        mask=_Chosen(chosen, method.query_tile, method.key_tile) & _or_all(call.mask)
    )
    return attend(q, k, v, call_chosen, method.inner)


@dataclass(frozen=True)
class _All(Mask):
    def visible(self, pairs: Pairs) -> Tensor:
        return torch.ones_like(pairs.query + pairs.key, dtype=torch.bool)


def _or_all(mask: Mask | None) -> Mask:
    return _All() if mask is None else mask


def _allowed(q: Tensor, k: Tensor, call: Call, method: Selected) -> Tensor:
    """(B or 1, H or 1, T, C): tiles with at least one visible pair."""
    mask = call.visibility(method.inner.mask)
    if mask is None:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)
    seen = mask.dense(call.frame(q, k))
    return (
        seen.unflatten(2, (-1, method.query_tile))
        .unflatten(-1, (-1, method.key_tile))
        .any(-1)
        .any(3)
    )


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, call: Call, method: Selected, choice: Choice
) -> Result:
    q, k, v = without_padding(q, k, v, call)
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    b, h, n, d = q.shape
    offsets = torch.arange(method.key_tile, device=q.device)
    keys = (
        (choice.index[..., None] * method.key_tile + offsets).flatten(-2).expand(b, h, -1, -1)
    )  # (B,H,T,w)
    valid = choice.valid.repeat_interleave(method.key_tile, -1).expand_as(keys)
    near_k, near_v = _rows(k, keys), _rows(v, keys)  # (B,H,T,w,D)
    rows = torch.arange(n, device=q.device).unflatten(0, (-1, method.query_tile))  # (T,t)
    pairs = call.frame(q, k).at(
        torch.arange(b, device=q.device)[:, None, None, None, None],
        torch.arange(h, device=q.device)[:, None, None, None],
        rows[:, :, None],
        keys[..., None, :],
    )
    scores = q.unflatten(2, (-1, method.query_tile)) @ near_k.transpose(-1, -2)
    scores = scores * scale_of(call, method.inner.scale, d)
    if method.inner.key_bias is not None:
        bias = method.inner.key_bias.expand(b, h, -1)
        scores = (
            scores
            + bias[:, :, None].expand(-1, -1, keys.shape[2], -1).gather(-1, keys)[..., None, :]
        )
    inner = Scored(method.inner.normalise, method.inner.score)
    scores = modified_scores(scores, inner, pairs)
    mask = call.visibility(method.inner.mask)
    visible = valid[..., None, :] if mask is None else valid[..., None, :] & mask.visible(pairs)
    weights, _ = normalised(scores, visible, inner.normalise, need_lse=False)
    output = (weights @ near_v).flatten(2, 3)
    if call.query_padding is not None:
        output = output.masked_fill(~call.query_padding[:, None, :, None], 0.0)
    return Result(output)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B,H,M,D) at index (B,H,T,w) -> (B,H,T,w,D)."""
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).unflatten(2, tuple(index.shape[2:]))
