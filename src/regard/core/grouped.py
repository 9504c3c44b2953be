r"""Grouped selection: each group chooses queries and keys, and attention runs inside the groups.

    o_i = mean over the groups g that chose query i of inner(q_i, keys of g)

Clusters with members of both sides work this way. A query no group chose gives zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.call import Call, Result
from regard.core.rows import take_rows
from regard.core.selected import Choice
from regard.core.weights import Scored, modified_scores, normalised, scale_of

MEAN_EPS = 1e-5


@dataclass(frozen=True, eq=False)
class Grouped:
    """One grouped mechanism, as data.

    queries, keys: choices (B,H,G,w) of members per group. inner: what runs inside a group. extra:
    keys and values (H,G,e,D) that every query of a group sees besides, or None.
    """

    queries: Choice
    keys: Choice
    inner: Scored
    extra: tuple[Tensor, Tensor] | None = None


def attend_in_groups(q: Tensor, k: Tensor, v: Tensor, call: Call, method: Grouped) -> Result:
    """Run a grouped mechanism on q (B,H,N,D), k (B,H,M,D), v (B,H,M,E), padding already zeroed."""
    own, theirs = method.queries, method.keys
    near_q = take_rows(q, own.index) * scale_of(call, method.inner.scale, q.shape[-1])
    near_k, near_v = take_rows(k, theirs.index), take_rows(v, theirs.index)  # (B,H,G,w,D)
    pairs = call.frame(q, k).at(
        torch.arange(q.shape[0], device=q.device)[:, None, None, None, None],
        torch.arange(q.shape[1], device=q.device)[:, None, None, None],
        own.index[..., None],
        theirs.index[..., None, :],
    )
    scores = modified_scores(near_q @ near_k.mT, method.inner, pairs, near_q)
    mask = call.visibility(method.inner.mask)
    visible = own.valid[..., None] & theirs.valid[..., None, :]
    visible = visible if mask is None else visible & mask.visible(pairs)
    if method.extra is not None:
        extra_k, extra_v = method.extra
        scores = torch.cat([near_q @ extra_k.mT, scores], -1)
        visible = F.pad(visible, (extra_k.shape[2], 0), value=True)
        near_v = torch.cat([extra_v.expand(q.shape[0], -1, -1, -1, -1), near_v], 3)
    weights, _ = normalised(scores, visible, method.inner.normalise, need_lse=False)
    return Result(_mean(weights @ near_v, own, q.shape[2]))


def _mean(parts: Tensor, own: Choice, n: int) -> Tensor:
    """Outputs (B,H,G,w,E) of chosen queries averaged over the groups that chose them: (B,H,n,E)."""
    place = own.index.flatten(2)[..., None]  # (B,H,G*w,1)
    counts = own.valid.flatten(2)[..., None].to(parts.dtype)
    parts = parts.flatten(2, 3) * counts
    total = parts.new_zeros(*parts.shape[:2], n, parts.shape[-1])
    total = total.scatter_add(2, place.expand_as(parts), parts)
    times = parts.new_zeros(*parts.shape[:2], n, 1).scatter_add(2, place, counts)
    return total / (times + MEAN_EPS)
