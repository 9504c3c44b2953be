r"""Core context aware attention: near tokens are read as they are, far ones as one pooled core
token per group, in one softmax.

    kc_c = sum_t w_t k_t    vc_c = sum_t w_t v_t    w = softmax over group c of q_last(c) . k_t s
    o_p = softmax over {kc_c : c < m_p} and {k_t : g m_p <= t <= p} of q_p . k s, times vc and v

p counts from zero, q (B,H,N,D), k (B,H_k,N,D), v (B,H_v,N,E), s = 1/sqrt(D). A group holds g tokens
(`group`), q_last(c) is the query of the last one, and m_p = max(0, (p + 1 - `local`) // g): a query
itself and at least the `local` - 1 tokens before it are read as they are, and every past token
stands in exactly one of the two sets. The work is N (N/g + local); decoding keeps the cores of
finished groups and the recent tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.blocks import Tiles
from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Limit, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.frame import Pairs
from regard.core.mask import Mask
from regard.core.padding import front_aligned
from regard.core.recurrent import is_causal
from regard.core.scored import Impl, attend, without_padding
from regard.core.weights import Scored, Softmax, repeat_heads, scale_of


@dataclass(frozen=True, eq=False)
class Cores:
    """What decoding carries.

    core_k (B,H,m,D), core_v (B,H,m,E): the core of group c at place c. k (B,H_k,L,D), v
    (B,H_v,L,E): tokens from position `start` (B,) on. seen (B,): tokens so far. arrived: the same
    with padding, a bound for all rows.
    """

    core_k: Tensor
    core_v: Tensor
    k: Tensor
    v: Tensor
    start: Tensor
    seen: Tensor
    arrived: int = 0


@dataclass(frozen=True)
class CoreOrLocal(Mask):
    """The first `cores` keys stand for groups, at the position of their last token, and are visible
    once the group is far; the other keys are tokens, visible while they are near.
    """

    cores: int
    group: int
    local: int

    def far(self, position: Tensor) -> Tensor:
        """What lies before this position is read through cores."""
        return ((position + 1 - self.local) // self.group).clamp_min(0) * self.group

    def visible(self, pairs: Pairs) -> Tensor:
        far = self.far(pairs.query)
        near = (pairs.key >= far) & (pairs.key <= pairs.query)
        return torch.where(pairs.key_index < self.cores, pairs.key < far, near)

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        least, most = self.far(tiles.query_low), self.far(tiles.query_high)
        core = tiles.key_low < most, tiles.key_high < least
        near = (
            (tiles.key_high >= least) & (tiles.key_low <= tiles.query_high),
            (tiles.key_low >= most) & (tiles.key_high <= tiles.query_low),
        )
        first = torch.arange(tiles.key_low.shape[-1], device=least.device) * tiles.key_block
        all_cores, no_cores = first + tiles.key_block <= self.cores, first >= self.cores
        some, full = (
            torch.where(all_cores, c, torch.where(no_cores, n, either))
            for c, n, either in zip(core, near, tiles.unknown, strict=True)
        )
        return some, full


def cca(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    group: int = 16,
    local: int = 1024,
    impl: Impl = "auto",
    state: Cores | None = None,
) -> Result:
    """Core context aware attention of tokens that follow `state` (None at the start).

    Raises:
        UnsupportedError: not causal self-attention.
    """
    check_qkv(q, k, v, call)
    if group < 1 or local < 1:
        raise ArgumentError("group, local", "at least 1 token each", (group, local))
    if not is_causal(call, "cca") or q.shape[2] != k.shape[2]:
        raise UnsupportedError("cca", "it is causal self-attention only")
    call = call.of_self()
    q, k, v = without_padding(q, k, v, call)
    if state is None:
        none, start = slice(0, 0), q.new_zeros(q.shape[0], dtype=torch.long)
        core_k, core_v = (repeat_heads(x[:, :, none], q.shape[1]) for x in (k, v))
        state = Cores(core_k, core_v, k[:, :, none], v[:, :, none], start, start)
    if q.shape[2] == 0:
        return Result(q.new_zeros(*q.shape[:3], v.shape[-1]), state=state)
    span = _spanned(q, k, v, call, state)
    core_k, core_v = _cores(span, state, group, scale_of(call, None, q.shape[-1]))
    mask = CoreOrLocal(core_k.shape[2], group, local)
    cores = torch.arange(mask.cores, device=q.device)
    keys = torch.cat([core_k, repeat_heads(span.k, q.shape[1])], 2)
    values = torch.cat([core_v, repeat_heads(span.v, q.shape[1])], 2)
    positions = torch.cat([((cores + 1) * group - 1).expand(q.shape[0], -1), span.positions], 1)
    padding = torch.cat([cores < span.seen[:, None] // group, span.real], 1)
    inner = call.but(
        mask=mask, padding=padding, query_positions=span.queries, key_positions=positions
    )
    output = attend(q, keys, values, inner, Scored(), impl=impl).output
    return Result(output, state=_after(span, core_k, core_v, mask, state.arrived + q.shape[2]))


@dataclass(frozen=True, eq=False)
class _Span:
    """Recent and new tokens in their order: q (B,H,R,D), k (B,H_k,R,D), v (B,H_v,R,E), real and
    positions (B,R). queries (B,N): positions of the new tokens. seen (B,): tokens up to now.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    real: Tensor
    positions: Tensor
    queries: Tensor
    seen: Tensor


def _spanned(q: Tensor, k: Tensor, v: Tensor, call: Call, state: Cores) -> _Span:
    real = call.padding
    if real is None:
        real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
    recent = torch.arange(state.k.shape[2], device=q.device) < (state.seen - state.start)[:, None]
    order = front_aligned(torch.cat([recent, real], 1))
    places = torch.arange(order.padding.shape[1], device=q.device)
    return _Span(
        order.front(F.pad(q, (0, 0, recent.shape[1], 0))),  # queries of recent tokens are not kept
        order.front(torch.cat([state.k, k], 2)),
        order.front(torch.cat([state.v, v], 2)),
        order.padding,
        state.start[:, None] + places,
        (state.seen[:, None] + real.cumsum(-1) - 1).clamp_min(0),
        state.seen + real.sum(-1),
    )


def _cores(span: _Span, state: Cores, group: int, scale: float) -> tuple[Tensor, Tensor]:
    """Core keys (B,H,m,D) and values (B,H,m,E): carried ones, then those of the span's groups."""
    heads, fringe = span.q.shape[1], -span.k.shape[2] % group
    k, v = (
        F.pad(repeat_heads(x, heads), (0, 0, 0, fringe)).unflatten(2, (-1, group))
        for x in (span.k, span.v)
    )  # (B,H,G,g,D)
    last = F.pad(span.q, (0, 0, 0, fringe))[:, :, group - 1 :: group, None]  # (B,H,G,1,D)
    visible = F.pad(span.real, (0, fringe)).unflatten(1, (-1, group))[:, None, :, None]
    weights = Softmax()(last @ k.mT * scale, visible, visible.sum(-1, keepdim=True))
    number = torch.arange((state.arrived + span.queries.shape[1]) // group, device=k.device)
    known = (number < state.seen[:, None] // group)[:, None, :, None]
    fresh = (number - state.start[:, None] // group).clamp(0, k.shape[2] - 1)[:, None, :, None]

    def joined(old: Tensor, new: Tensor) -> Tensor:
        old = F.pad(old, (0, 0, 0, len(number) - old.shape[2]))
        return torch.where(known, old, new.gather(2, fresh.expand(-1, heads, -1, new.shape[-1])))

    return (
        joined(state.core_k, (weights @ k).squeeze(3)),
        joined(state.core_v, (weights @ v).squeeze(3)),
    )


def _after(span: _Span, core_k: Tensor, core_v: Tensor, mask: CoreOrLocal, arrived: int) -> Cores:
    """The state after the span: cores, and the tokens that the next query will read as they are."""
    start = mask.far(span.seen)
    kept = torch.arange(min(span.k.shape[2], mask.group + mask.local - 2), device=start.device)
    place = (start - span.positions[:, 0])[:, None] + kept
    index = place.clamp_max(span.k.shape[2] - 1)[:, None, :, None]
    k, v = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (span.k, span.v))
    return Cores(core_k, core_v, k, v, start, span.seen, arrived)


CCA = Card(
    name="cca",
    kind="operator",
    build=cca,
    papers=(
        Paper(
            "2412.12465", "Core Context Aware Transformers for Long Context Language Modeling", 2024
        ),
    ),
    family="pooled",
    patterns=("causal self",),
    cost=Cost(time=2, state="keys"),
    claim=Claim(
        "recalls part of what softmax does, from less than half of its decode state",
        'regard compare --mechanisms "softmax,cca(group=4,local=8)"',
    ),
    # whole matrices: the tiles of `auto` reach their exponent of 2 beyond the lengths counted
    example=Example(options={"group": 3, "local": 2, "impl": "dense"}),
    limits=(
        Limit({"group": 1, "local": 2}, "softmax"),
        Limit({"group": 3, "local": 10**6}, "softmax"),
    ),
    forms=("impl", ("dense", "sdpa", "tiled")),
    deviations=(
        "the printed window repeats the last token of the last core; here the sets are disjoint",
        "each head pools its own keys and values, which is the pooling of inputs by linearity",
        "keys are pooled as they come: with rotary positions, already turned",
    ),
)
