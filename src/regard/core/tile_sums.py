"""Sums over the keys of a tile of weights, without a matrix of indices for every head."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.observe import RUN, Seen
from regard.core.probe import Look, of_keys, of_rows


def along_keys(weights: Tensor, x: Tensor) -> Tensor:
    """sum_j w_ij x_ij (b,h,n) of weights (b,h,n,m) and numbers x (b or 1,1,n,m) that all heads
    share.
    """
    x = x[:, 0, :, None].to(weights.dtype).expand(len(weights), -1, -1, -1)
    products = [
        torch.bmm(w.transpose(0, 1), y.mT)[..., 0].mT  # (n,h,m) (n,m,1) -> (h,n)
        for w, y in zip(weights, x, strict=True)
    ]
    return torch.stack(products)


def before(seen: Seen, look: Look, bounds: Tensor) -> Tensor:
    """Weight (b,h,n,k) of the keys whose positions are lower than bounds (b,n,k)."""
    keys = look.keys[seen.batch][:, seen.keys].contiguous()
    heads, m = seen.weights.shape[1], seen.weights.shape[-1]
    if not m:
        return seen.weights.new_zeros(*seen.weights.shape[:3], bounds.shape[-1])
    count = torch.searchsorted(keys, bounds.flatten(1).contiguous()).view_as(bounds)[:, None]
    runs = count // RUN
    own = torch.arange(RUN, device=count.device)
    rest = (runs[..., None] * RUN + own).clamp_max(m - 1).flatten(-2)
    last = seen.weights.gather(-1, rest.expand(-1, heads, -1, -1)).unflatten(-1, (-1, RUN))
    whole = seen.runs.gather(-1, runs.expand(-1, heads, -1, -1))
    return whole + (last * (own < (count % RUN)[..., None])).sum(-1)


def equal(seen: Seen, keys: Tensor, rows: Tensor) -> Tensor:
    """One where numbers of the keys (B,M) are those of the queries (B,N), else zero: (b,1,n,m), in
    the dtype of the weights, in which the numbers must be exact.
    """
    keys, rows = (x.to(seen.weights.dtype) for x in (of_keys(keys, seen), of_rows(rows, seen)))
    found = torch.empty(torch.broadcast_shapes(keys.shape, rows.shape)).to(keys)
    return torch.eq(keys, rows, out=found)


def past(seen: Seen, look: Look) -> int:
    """How many of the tile's keys, from the first on, stand before all of its queries."""
    queries = look.queries[seen.batch, seen.rows]
    keys = look.keys[seen.batch][:, seen.keys]
    return int((keys < queries.amin(-1, keepdim=True)).sum(-1).amin()) if queries.numel() else 0
