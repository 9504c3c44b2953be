r"""Attention from the regions of an image to the regions each of them has chosen.

    o_i = sum_{j in chosen(r(i))} softmax_j(q_i . k_j s) v_j        chosen(r) = top-k of row r of A

Two forms: `masked` scores every pair of tokens and hides what was not chosen (the truth),
`gathered` copies the chosen regions beside each region of queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.scored import attend
from regard.core.selected import Selected, choose, select
from regard.core.weights import Scored, Softmax
from regard.layers.attention import join_heads, split_heads


@dataclass(frozen=True, eq=False)
class Regions:
    """Tokens by region, and who chooses whom.

    q (B,T,a,C); kv (B,T,a',2C), keys before values; logits A (B,T,T); keep: regions chosen by each.
    queries (B,T,a) and keys (B,T,a') mark real tokens, None = all are.
    """

    q: Tensor
    kv: Tensor
    logits: Tensor
    keep: int
    queries: Tensor | None = None
    keys: Tensor | None = None


def masked(regions: Regions, heads: int, scale: float) -> Tensor:
    """Output (B,T,a,C), heads joined."""
    q = regions.q
    method = Selected(regions.logits[:, None], regions.keep, q.shape[2], regions.kv.shape[2])
    real = Call(padding=_flat(regions.keys, 1), query_padding=_flat(regions.queries, 1))
    k, v = regions.kv.flatten(1, 2).chunk(2, -1)
    q, k, v = (split_heads(x, heads) for x in (q.flatten(1, 2), k, v))
    mixed = select(q, k, v, real.but(scale=scale), method).output
    return join_heads(mixed).reshape(regions.q.shape)


def gathered(
    regions: Regions, heads: int, scale: float, *, soft: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B,T,a,C), indices (B,T,keep) of the chosen regions, best first, and the softmax of
    their logits, by which `soft` multiplies what was chosen.
    """
    keys = regions.keys
    reach = torch.ones_like(regions.logits[:1], dtype=torch.bool)
    choice = choose(regions.logits, reach if keys is None else keys.any(-1)[:, None], regions.keep)
    weights = Softmax()(
        regions.logits.gather(-1, choice.index),
        choice.valid,
        choice.valid.sum(-1, keepdim=True),
    )
    batch = torch.arange(choice.index.shape[0], device=choice.index.device)[:, None, None]
    near = regions.kv[batch, choice.index]  # (B,T,keep,a',2C)
    if soft:
        near = near * weights[..., None, None]
    seen = (
        None if keys is None else (keys[batch, choice.index] & choice.valid[..., None]).flatten(2)
    )
    real = Call(padding=_flat(seen, 0), query_padding=_flat(regions.queries, 0))
    k, v = near.flatten(2, 3).flatten(0, 1).chunk(2, -1)  # (B*T,keep*a',C)
    q, k, v = (split_heads(x, heads) for x in (regions.q.flatten(0, 1), k, v))
    mixed = attend(q, k, v, real.but(scale=scale), Scored()).output
    return join_heads(mixed).reshape(regions.q.shape), choice.index, weights


def _flat(real: Tensor | None, first: int) -> Tensor | None:
    return None if real is None else real.flatten(first, first + 1)
