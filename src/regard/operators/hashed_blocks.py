r"""Hashed blocks: keys sorted by bucket and cut into blocks, of which a query reads one, and a few
keys drawn from the others; causal calls by halves.

    lse_i = logsumexp(lse over the block of i,  lse over the drawn keys outside it + log(M/m))

q, k (B,H,N,D), v (B,H,N,E) without padding; results carry their log-sum-exp (B,H,N). Both parts are
plain attention under a mask of equal numbers, heads standing as sequences, so that tiles skip what
lies outside; `merge` joins them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.call import Call, Result
from regard.core.mask import Causal, Mask, Outside
from regard.core.merge import merge
from regard.core.scored import Impl, attend
from regard.core.weights import Scored
from regard.importance.angular_hash import AngularHash
from regard.masks.document import Document

Draw = Callable[[int, int, int], Tensor]
"""(branch of the recursion, heads, keys) -> places of the drawn keys, (B or 1, heads, m)."""


@dataclass(frozen=True, eq=False)
class Rule:
    """How rows are approximated. published: count the zeros that fill the last block of keys, and
    drawn keys of the own block a second time, as the authors' code does.
    """

    hashing: AngularHash
    draw: Draw
    block: int
    samples: int
    exact_below: int
    by_rank: bool
    scale: float
    impl: Impl = "auto"
    published: bool = False

    def call(self, mask: Mask | None = None) -> Call:
        """A call of plain attention."""
        return Call(mask=mask, scale=self.scale)


def causal_halves(q: Tensor, k: Tensor, v: Tensor, rule: Rule, branch: int = 1) -> Result:
    """Causal attention with its log-sum-exp, by halves; q, k (B,H,N,D), v (B,H,N,E)."""
    n = q.shape[2]
    if n <= rule.exact_below:
        return attend(q, k, v, rule.call(Causal()), Scored(), impl=rule.impl, need_lse=True)
    q, k, v = (F.pad(x, (0, 0, 0, n % 2)) for x in (q, k, v))
    half = q.shape[2] // 2
    halves = [x.unflatten(2, (2, half)).flatten(1, 2) for x in (q, k, v)]  # heads 2h and 2h + 1
    own = causal_halves(halves[0], halves[1], halves[2], rule, 2 * branch)
    output, lse = own.output.unflatten(1, (-1, 2)), own.row_lse.unflatten(1, (-1, 2))
    across = approximate(q[:, :, half:], k[:, :, :half], v[:, :, :half], rule, 2 * branch + 1)
    late = merge([Result(output[:, :, 1], lse[:, :, 1]), across])
    return Result(
        torch.cat([output[:, :, 0], late.output], 2)[:, :, :n],
        torch.cat([lse[:, :, 0], late.row_lse], 2)[:, :, :n],
    )


def approximate(q: Tensor, k: Tensor, v: Tensor, rule: Rule, branch: int = 1) -> Result:
    """Attention to every key with its log-sum-exp; q (B,H,N,D), k (B,H,M,D), v (B,H,M,E)."""
    n, m = q.shape[2], k.shape[2]
    if n < rule.exact_below or not m:
        return attend(q, k, v, rule.call(), Scored(), impl=rule.impl, need_lse=True)
    buckets, order = rule.hashing.buckets(k).sort(dim=-1, stable=True)
    blocks, query_order = _blocks(rule.hashing.buckets(q), buckets, rule)
    q, k, v = (_ordered(x, o) for x, o in ((q, query_order), (k, order), (v, order)))
    q, heads = q.flatten(0, 1)[:, None], q.shape[:2]  # a head is a sequence with its own blocks
    fringe = -m % rule.block if rule.published else 0
    keys, values = (F.pad(x, (0, 0, 0, fringe)).flatten(0, 1)[:, None] for x in (k, v))
    number = torch.arange(m + fringe, device=q.device) // rule.block
    near = Document(blocks.flatten(0, 1), number.expand(len(q), -1))
    parts = [attend(q, keys, values, rule.call(near), Scored(), impl=rule.impl, need_lse=True)]
    if rule.samples and m > rule.block:
        places = rule.draw(branch, heads[1], m).expand(*heads, -1)
        own = Document(blocks.flatten(0, 1), places.flatten(0, 1) // rule.block)
        far = rule.call(None if rule.published else Outside(own))
        keys, values = (_ordered(x, places).flatten(0, 1)[:, None] for x in (k, v))
        weight = q.new_full((1, 1, rule.samples), math.log(m / rule.samples))
        method = Scored(key_bias=weight)
        parts.append(attend(q, keys, values, far, method, impl=rule.impl, need_lse=True))
    found, back = merge(parts), query_order.argsort(-1)
    lse = found.row_lse.unflatten(0, heads)[:, :, 0].gather(2, back)
    return Result(_ordered(found.output.unflatten(0, heads)[:, :, 0], back), lse)


def _blocks(own: Tensor, theirs: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """The block of keys of each query and the order of the queries by it, both (B,H,N); own
    (B,H,N): buckets of queries, theirs (B,H,M): sorted ones of keys.
    """
    n, m = own.shape[2], theirs.shape[2]
    count = -(-m // rule.block)
    if rule.by_rank:
        size = -(-(n + -n % rule.block) // count)
        rank = torch.arange(n, device=own.device) // size
        return rank.clamp_max(count - 1).expand_as(own), own.argsort(dim=-1, stable=True)
    first = torch.searchsorted(theirs, own)
    last = torch.searchsorted(theirs, own, right=True)
    place = ((first + last) // 2).clamp_max(m - 1) // rule.block
    return place.sort(dim=-1, stable=True)


def _ordered(x: Tensor, order: Tensor) -> Tensor:
    """Rows order (B,H,n) of x (B,H,N,D)."""
    return x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1]))
