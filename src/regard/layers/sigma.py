r"""DiffQKV attention (Sigma): queries, keys and values have their own numbers of heads and widths,
chosen by what each costs in the cache and in quality.

    o_h = softmax(q_h . k_{h H_k // H} s) v_{h H_v // H}        q: (B,H,N,D_k)
    k: (B,H_k,M,D_k)  v: (B,H_v,M,D_v)                          cached: H_k D_c + H_v D_v per token

s is 1/sqrt(D_k). Keys suffer least, so H_k < H_v; queries are not cached, so they may be computed
by a wider gated path, W_2 (silu(W_1 x) * W_3 x). Keys may be cached at D_c < D_k channels, which
one matrix widens before the scores (and before they rotate). While decoding, only `value_rows`
values per query may be read, those of the largest weights, which are not renormalised.

Differs from the paper: the inside of the wider query path is not printed there; it is the gated
path of the feed-forward it is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Limit, Paper
from regard.core.errors import ArgumentError
from regard.core.scored import attend
from regard.core.selected import choose
from regard.core.weights import Scored, group_scores, group_values, normalised, scale_of
from regard.features.rotary import Style, rotary_angles, rotate
from regard.layers.attention import Attention, split_heads


class GatedQueries(nn.Module):
    """W_2 (silu(W_1 x) * W_3 x): (B,N,dim) -> (B,N,width) through `hidden` channels."""

    def __init__(self, dim: int, hidden: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class CachedHeads(nn.Module):
    """Softmax attention on keys as they are cached; while decoding, over `value_rows` values."""

    def __init__(
        self, cached_dim: int, key_dim: int, value_rows: int | None, rope: Style | None
    ) -> None:
        super().__init__()
        narrow = cached_dim < key_dim
        self.widen = nn.Linear(cached_dim, key_dim, bias=False) if narrow else None
        self.value_rows = value_rows
        self.rope: Style | None = rope

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """q (B,H,N,D_k), k (B,H_k,M,D_c), v (B,H_v,M,D_v) -> (B,H,N,D_v)."""
        if self.widen is not None:
            k = self.widen(k)
            if self.rope is not None:
                _, keys = call.positions(q.shape[2], k.shape[2], k.device)
                k = rotate(k, rotary_angles(keys, k.shape[-1])[:, None], self.rope)
        if self.value_rows is None or call.step is None:
            return attend(q, k, v, call, Scored())
        return selective_values(q, k, v, call, self.value_rows)


def selective_values(q: Tensor, k: Tensor, v: Tensor, call: Call, rows: int) -> Result:
    """Softmax over all visible keys, of which only the `rows` largest weights are used, as they
    are.
    """
    scores = group_scores(q, k) * scale_of(call, None, q.shape[-1])
    mask = call.visibility()
    visible = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None:
        visible = mask.dense(call.frame(q, k))
    weights, _ = normalised(scores, visible, Scored().normalise, need_lse=False)
    index = choose(weights, visible, rows).index
    kept = torch.zeros_like(weights).scatter(-1, index, weights.gather(-1, index))
    return Result(group_values(kept, v))


class Sigma(Attention):
    """Softmax attention with widths and head counts of its own for queries, keys and values.

    Args:
        dim, heads: model width C and query heads H. key_heads, value_heads: H_k and H_v (default
            about H / 8 and H / 2, as published). key_dim, value_dim: D_k and D_v (default C / H and
            D_k). cached_key_dim: D_c (default D_k). query_hidden: channels of the wider query path,
            None = a plain projection. value_rows: values read per query while decoding, None = all.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        key_heads: int | None = None,
        value_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        cached_key_dim: int | None = None,
        query_hidden: int | None = None,
        value_rows: int | None = None,
        rope: Style | None = None,
    ) -> None:
        super().__init__(dim, heads, head_dim=key_dim, rope=rope)
        self.key_heads = key_heads or gcd(heads, max(1, heads // 8))
        self.value_heads = value_heads or gcd(heads, max(1, heads // 2))
        for name, count in (("key_heads", self.key_heads), ("value_heads", self.value_heads)):
            if count < 1 or heads % count:
                raise ArgumentError(name, f"a divisor of heads={heads}", count)
        cached, width = cached_key_dim or self.head_dim, value_dim or self.head_dim
        if not 1 <= cached <= self.head_dim:
            raise ArgumentError("cached_key_dim", f"1 to key_dim={self.head_dim}", cached)
        if query_hidden is not None:
            self.q_proj = GatedQueries(dim, query_hidden, heads * self.head_dim)
        self.k_proj = nn.Linear(dim, self.key_heads * cached, bias=False)
        self.v_proj = nn.Linear(dim, self.value_heads * width, bias=False)
        self.o_proj = nn.Linear(heads * width, dim, bias=False)
        self.inner = CachedHeads(cached, self.head_dim, value_rows, rope)

    def heads_in(self, x: Tensor, context: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        q = split_heads(self.q_proj(x), self.heads)
        k = split_heads(self.k_proj(context), self.key_heads)
        v = split_heads(self.v_proj(context), self.value_heads)
        if self.rope is None:
            return q, k, v
        queries, keys = call.positions(x.shape[1], context.shape[1], x.device)
        q = rotate(q, rotary_angles(queries, self.head_dim)[:, None], self.rope)
        if self.inner.widen is None:
            k = rotate(k, rotary_angles(keys, self.head_dim)[:, None], self.rope)
        return q, k, v


def _repeated_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Two key heads written out four times are attention with four."""
    keys = state["k_proj.weight"].unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
    return {**state, "k_proj.weight": keys}


_PLAIN = {"value_dim": 8, "cached_key_dim": 8, "query_hidden": None}
_ALL_HEADS = {"shared": 4, "active": 0}

SIGMA = Card(
    name="sigma",
    kind="layer",
    build=Sigma,
    papers=(
        Paper(
            "2501.13629",
            "Sigma: Differential Rescaling of Query, Key and Value for Efficient Language Models",
            2025,
        ),
    ),
    family="scored",
    patterns=("noncausal self", "causal self", "noncausal cross", "causal cross"),
    grids=(1, 2, 3),
    cost=Cost(time=2, state="keys"),
    claim=Claim(
        "recalls like softmax attention from a much smaller cache",
        "regard compare --task recall --mechanisms softmax,sigma",
    ),
    example=Example(
        options={
            "key_heads": 1,
            "value_heads": 2,
            "value_dim": 6,
            "cached_key_dim": 4,
            "query_hidden": 12,
            "value_rows": 100,
        }
    ),
    limits=(
        Limit({**_PLAIN, "key_heads": 4, "value_heads": 4}, "moh_llama", _ALL_HEADS),
        Limit(
            {**_PLAIN, "key_heads": 2, "value_heads": 2},
            "moh_llama",
            {**_ALL_HEADS, "kv_heads": 2},
        ),
        Limit(
            {**_PLAIN, "key_heads": 2, "value_heads": 4},
            "moh_llama",
            _ALL_HEADS,
            weights=_repeated_keys,
        ),
    ),
    deviations=("the wider query path is a gated path; the paper does not print its inside",),
)
