r"""Selected family: tiles of keys are ranked by importance, the best under a budget are kept, an
inner scored rule runs on them.

    C_t = top-w { importance_tc : tile c holds a key visible to tile t }        o_i = inner(q_i,
    keys of C_t(i))

Two executors: `masked` scores every pair and hides what was not chosen (the truth), `gathered`
reads only chosen keys. Ties go to the later key, so that the choice is the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.decoding import reads_for_one
from regard.core.errors import ArgumentError
from regard.core.frame import Pairs
from regard.core.mask import Mask, both
from regard.core.rows import key_products, take_rows, value_sums
from regard.core.scored import all_real, attend
from regard.core.weights import Scored, modified_scores, normalised, scale_of

Impl = Literal["masked", "gathered"]


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


@dataclass(frozen=True, eq=False)
class Choice:
    """Chosen tiles: `index` (B,H,T,w) and `valid` (same shape), False where fewer than w tiles were
    visible.
    """

    index: Tensor
    valid: Tensor

    def mask(self, tiles: int) -> Tensor:
        """The same choice as booleans (B,H,T,tiles)."""
        hits = self.valid.new_zeros(*self.index.shape[:-1], tiles, dtype=torch.long)
        return hits.scatter_add(-1, self.index, self.valid.long()) > 0


def choose(importance: Tensor, allowed: Tensor, keep: int) -> Choice:
    """The `keep` most important allowed tiles per row of (…,T,C); ties go to the later tile.

    An allowed tile comes before every other one, however low its importance. One ranking for all
    rows (T = 1) is sorted once.
    """
    if keep < 1:
        raise ArgumentError("keep", "at least 1", keep)
    keep = min(keep, importance.shape[-1])
    finite = importance.clamp_min(torch.finfo(importance.dtype).min)
    if importance.shape[-2] == 1 and allowed.shape[-2] != 1:
        return _first_allowed(_descending(finite), allowed, keep)
    finite, allowed = torch.broadcast_tensors(finite, allowed)
    ranked = finite.masked_fill(~allowed, float("-inf"))
    index = _first(ranked, keep)
    return Choice(index, allowed.gather(-1, index))


def _first(importance: Tensor, count: int) -> Tensor:
    """The first `count` of the descending order; few of many are found without sorting them all."""
    if count * 8 > importance.shape[-1] or torch.compiler.is_compiling() or importance.is_meta:
        return _descending(importance)[..., :count]
    importance = importance.nan_to_num(float("inf"), float("inf"), float("-inf"))
    least = importance.topk(count).values[..., -1:]
    taken = importance >= least
    if bool((taken.sum(-1) > count).any()):  # of those level with the least, the later ones
        above, level = importance > least, importance == least
        late = level.flip(-1).cumsum(-1).flip(-1) <= count - above.sum(-1, keepdim=True)
        taken = above | level & late
    places = taken.nonzero()[:, -1].reshape(*importance.shape[:-1], count)
    return places.gather(-1, _descending(importance.gather(-1, places)))


def _descending(importance: Tensor) -> Tensor:
    """Order of the last axis, most important first; ties put the later one first."""
    order = importance.flip(-1).argsort(dim=-1, descending=True, stable=True)
    return importance.shape[-1] - 1 - order


def _first_allowed(order: Tensor, allowed: Tensor, keep: int) -> Choice:
    """The first `keep` allowed tiles of each row in one order (…,1,C) for all rows."""
    shape = torch.broadcast_shapes(order.shape, allowed.shape)
    order, allowed = order.expand(shape), allowed.expand(shape)
    seen = allowed.gather(-1, order).cumsum(-1, dtype=torch.int32)  # allowed tiles so far
    wanted = torch.arange(1, keep + 1, dtype=torch.int32, device=order.device)
    place = torch.searchsorted(seen, wanted.expand(*shape[:-1], keep).contiguous())
    valid = place < shape[-1]
    return Choice(order.gather(-1, place.clamp_max(max(shape[-1] - 1, 0))), valid)


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
    impl: Impl = "masked",
) -> Result:
    """Run a selecting mechanism on q (B,H,N,D), k (B,H_k,M,D), v (B,H_v,M,E).

    Raises:
        ArgumentError: tiles that do not divide N or M, or an importance of the wrong shape.
    """
    check_qkv(q, k, v, call)
    if q.shape[2] % method.query_tile or k.shape[2] % method.key_tile:
        raise ArgumentError(
            "tiles", "tile sizes that divide the lengths", (method.query_tile, method.key_tile)
        )
    rows, tiles = q.shape[2] // method.query_tile, k.shape[2] // method.key_tile
    shape = tuple(method.importance.shape)
    if len(shape) != 4 or shape[2] not in (1, rows) or shape[3] != tiles:
        raise ArgumentError("importance", f"(B, H, 1 or {rows}, {tiles})", shape)
    choice = choose(method.importance, _allowed(q, k, call, method), method.keep)
    return attend_chosen(q, k, v, call, method, choice, impl=impl)


def attend_chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    method: Selected,
    choice: Choice,
    *,
    impl: Impl = "masked",
) -> Result:
    """Run the inner rule on tiles that were chosen already; the call's mask still holds inside
    them.
    """
    if impl == "gathered":
        return _gathered(q, k, v, call, method, choice)
    if impl != "masked":
        raise ArgumentError("impl", "'masked' or 'gathered'", impl)
    tiles = choice.mask(k.shape[2] // method.key_tile)
    chosen = _Chosen(tiles, method.query_tile, method.key_tile)
    return attend(q, k, v, call.but(mask=both(chosen, call.mask)), method.inner)


def _allowed(q: Tensor, k: Tensor, call: Call, method: Selected) -> Tensor:
    """(B or 1, H or 1, T, C): tiles with at least one visible pair."""
    mask = call.visibility(method.inner.mask)
    if mask is None:
        rows = q.shape[2] // method.query_tile
        return torch.ones(1, 1, rows, 1, dtype=torch.bool, device=q.device)
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
    b, h, n, d = q.shape
    keys, valid = _chosen_keys(choice, method.key_tile, b, h)  # (B,H,T,w)
    if call.query_padding is not None:
        q = q.masked_fill(~call.query_padding[:, None, :, None], 0.0)
    pairs = call.frame(q, k).at(
        torch.arange(b, device=q.device)[:, None, None, None, None],
        torch.arange(h, device=q.device)[:, None, None, None],
        torch.arange(n, device=q.device).unflatten(0, (-1, method.query_tile))[:, :, None],
        keys[..., None, :],
    )
    tiles = q.unflatten(2, (-1, method.query_tile))  # (B,H,T,t,D)
    products, near_v = _near(tiles, k, v, keys, call.padding)
    scores = products * scale_of(call, method.inner.scale, d)
    if method.inner.key_bias is not None:
        bias = method.inner.key_bias.expand(b, h, -1)[..., None]  # (B,H,M,1)
        scores = scores + take_rows(bias, keys).transpose(-1, -2)
    inner = replace(method.inner, key_bias=None)
    scores = modified_scores(scores, inner, pairs, tiles)
    mask = call.visibility(method.inner.mask)
    visible = valid[..., None, :] if mask is None else valid[..., None, :] & mask.visible(pairs)
    weights, _ = normalised(scores, visible, inner.normalise, need_lse=False)
    if near_v is None:
        output = value_sums(weights[:, :, 0], v, keys)
    else:
        output = (weights @ near_v).flatten(2, 3)
    if call.query_padding is not None:
        output = output.masked_fill(~call.query_padding[:, None, :, None], 0.0)
    return Result(output)


def _near(
    tiles: Tensor, k: Tensor, v: Tensor, keys: Tensor, padding: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Products of queries (B,H,T,t,D) with their chosen keys (B,H,T,w), and the chosen values
    (B,H,T,w,E); None where one query, as in decoding, reads them where they lie.
    """
    clean = padding is None or all_real(padding)
    if clean and tiles.shape[2] == 1 and reads_for_one(tiles[:, :, 0], k, v):
        return key_products(tiles[:, :, 0], k, keys[:, :, 0])[:, :, None], None
    near_k, near_v = take_rows(k, keys), take_rows(v, keys)
    if padding is not None and not clean:
        gone = ~padding[torch.arange(len(padding), device=k.device)[:, None, None, None], keys]
        near_k, near_v = (x.masked_fill(gone[..., None], 0.0) for x in (near_k, near_v))
    return tiles @ near_k.transpose(-1, -2), near_v


def _chosen_keys(choice: Choice, size: int, batch: int, heads: int) -> tuple[Tensor, Tensor]:
    """Indices of the keys in chosen tiles of `size` and whether they count, both (B,H,T,w*size)."""
    offsets = torch.arange(size, device=choice.index.device)
    keys = (choice.index[..., None] * size + offsets).flatten(-2)
    valid = choice.valid.repeat_interleave(size, -1)
    return keys.expand(batch, heads, -1, -1), valid.expand(batch, heads, -1, -1)
