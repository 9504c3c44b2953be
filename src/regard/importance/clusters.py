r"""Nearest centroids: what a token is about, as the number of its nearest cluster centre.

    c_j = argmax_c x_j . mu_c        mu_c <- normalised sum of the x_j with c_j = c

x (B,H,N,D) are unit vectors (`unit`), so the largest product with a centroid mu (H,k,D) is the
smallest distance: online k-means on the sphere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.frame import Pairs
from regard.core.mask import Mask
from regard.core.selected import Choice


def unit(x: Tensor) -> Tensor:
    """x (…,D) at length one; the zero vector stays zero."""
    return F.normalize(x, dim=-1)


def affinity(x: Tensor, centroids: Tensor) -> Tensor:
    """Products of unit vectors x (B,H,N,D) and centroids (H,k,D): (B,H,N,k)."""
    return x @ centroids.to(x.dtype).transpose(-1, -2)


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """Cluster of each token, (B,H,N) integers; no gradient."""
    return affinity(x.detach(), centroids).argmax(-1)


def own_centroid(cluster: Tensor, centroids: Tensor) -> Tensor:
    """Centroids (H,k,D) of clusters (B,H,N): (B,H,N,D)."""
    heads = torch.arange(centroids.shape[0], device=centroids.device)[:, None]
    return centroids[heads, cluster]


def k_means_step(x: Tensor, centroids: Tensor, real: Tensor | None = None) -> Tensor:
    """Centroids (H,k,D) after one iteration on x (B,H,N,D); an empty cluster keeps its centroid.

    real (B,N) marks the tokens that count.
    """
    members = F.one_hot(nearest(x, centroids), centroids.shape[1]).to(x.dtype)  # (B,H,N,k)
    if real is not None:
        members = members * real[:, None, :, None]
        x = x.masked_fill(~real[:, None, :, None], 0.0)
    total = torch.einsum("bhnk,bhnd->hkd", members, x)
    empty = members.sum((0, 2)) == 0
    return torch.where(empty[..., None], centroids, unit(total).to(centroids.dtype))


def commitment(x: Tensor, centroids: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean squared distance of unit vectors x (B,H,N,D) to their nearest centroids, over `real`
    tokens (B,N). Its gradient moves x towards the centroids, which stay.
    """
    gap = (x - own_centroid(nearest(x, centroids), centroids).to(x.dtype)).square().mean(-1)
    if real is None:
        return gap.mean()
    counted = real[:, None].expand_as(gap)
    return gap.masked_fill(~counted, 0.0).sum() / counted.sum().clamp_min(1)


@dataclass(frozen=True, eq=False)
class SameCluster(Mask):
    """Visible where query and key are in one cluster; own (B,H,N), theirs (B,H,M)."""

    own: Tensor
    theirs: Tensor

    def visible(self, pairs: Pairs) -> Tensor:
        return (
            self.own[pairs.b, pairs.h, pairs.query_index]
            == self.theirs[pairs.b, pairs.h, pairs.key_index]
        )


def last_members(
    own: Tensor, theirs: Tensor, order: Tensor, limit: Tensor | int, window: int
) -> Choice:
    """For each query the last `window` keys of its cluster, found by sorting, not by comparing.

    own (B,H,N): clusters of queries. theirs (B,H,M): clusters of keys, -1 for keys that do not
    count. order (B or 1, H or 1, M): the order of the keys, last ones preferred. limit: how many
    keys of that order a query may choose from, (B or 1, 1, N) or the same number for all.
    """
    m = theirs.shape[-1]
    place = torch.arange(m, device=theirs.device)
    order = order.expand(theirs.shape)
    code, move = (theirs.gather(-1, order) * (m + 1) + place).sort(-1)  # by cluster, then order
    members = order.gather(-1, move)
    first = own * (m + 1)
    start, end = torch.searchsorted(code, first), torch.searchsorted(code, first + limit)
    chosen = end[..., None] - 1 - place[: min(window, m)]
    index = members.gather(-1, chosen.clamp_min(0).flatten(2)).view(chosen.shape)
    return Choice(index, chosen >= start[..., None])
