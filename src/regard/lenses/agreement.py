r"""Agreement of two maps of what mattered: weights of attention and saliency, say.

    r = corr over all cells of (a - mean_t a) / std_t a and the same of b        t: a row, one token

Rows are standardised one by one, so that no token outweighs another; a constant row becomes zeros.
Pearson's r does not change when a row is shifted or scaled by a positive factor; Spearman's rho and
the overlap of the largest cells do not change under any increasing function of a row.

Source: cross-attention against saliency (arXiv 2509.18010). Maps are compared within an utterance;
the mean over utterances is the caller's `.mean()`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from regard.core.errors import ArgumentError


def pearson(a: Tensor, b: Tensor, real: Tensor | None = None) -> Tensor:
    """Pearson's r of maps (…,I,T): one number per map, (…); 0 where either map is constant.

    a and b may differ in leading axes that broadcast: maps (L,H,I,T) of every head against one of
    (I,T). real: boolean, broadcastable to the maps, False on padding; None: all counts.

    Raises:
        ArgumentError: maps of different size.
    """
    kept = _kept(a, b, real)
    x, y = (standardised(m.expand_as(kept), kept).flatten(-2) for m in (a, b))
    # rows have mean 0, so has the whole
    return _ratio((x * y).sum(-1), x.norm(dim=-1) * y.norm(dim=-1))


def spearman(a: Tensor, b: Tensor, real: Tensor | None = None) -> Tensor:
    """Spearman's rho of maps (…,I,T): Pearson's r of the ranks within rows, equal cells sharing the
    mean of their ranks. Shapes and errors as for `pearson`.
    """
    kept = _kept(a, b, real)
    return pearson(*(_ranks(m.expand_as(kept), kept) for m in (a, b)), real=kept)


def top_overlap(a: Tensor, b: Tensor, k: int, real: Tensor | None = None) -> Tensor:
    """Share of the k largest cells of a row that both maps (…,I,T) have in common, mean over rows
    with a real cell: (…). A row with fewer than k real cells counts with those it has. Of equal
    cells the earlier ones are taken.

    Raises:
        ArgumentError: maps of different size; k below 1 or above T.
    """
    kept = _kept(a, b, real)
    if not 1 <= k <= a.shape[-1]:
        raise ArgumentError("k", f"1 to {a.shape[-1]}", k)
    first, second = (_largest(m.expand_as(kept), kept, k) for m in (a, b))
    both = (first & second).sum(-1)
    there = kept.any(-1)
    shares = _ratio(both.double(), first.sum(-1).double())
    return _ratio(shares.sum(-1), there.sum(-1).double())


def standardised(maps: Tensor, real: Tensor) -> Tensor:
    """Rows of (…,T) less their mean, over their sample deviation, over real cells; zeros elsewhere
    and in constant rows.
    """
    count = real.sum(-1, keepdim=True)
    held = maps.masked_fill(~real, 0.0)
    low, high = (maps.masked_fill(~real, x).detach() for x in (torch.inf, -torch.inf))
    flat = low.amin(-1, keepdim=True) >= high.amax(-1, keepdim=True)
    centred = (held - held.sum(-1, keepdim=True) / count.clamp(min=1)).masked_fill(~real, 0.0)
    deviation = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return _ratio(centred, deviation.masked_fill(flat, 0.0))


def mean_of_heads(maps: Tensor, heads: Iterable[tuple[int, int]] | None = None) -> Tensor:
    """Mean (…) of maps (L,H,…) over some (layer, head); None: over all.

    Raises:
        ArgumentError: no head.
    """
    if heads is None:
        return maps.mean((0, 1))
    chosen = [maps[layer, head] for layer, head in heads]
    if not chosen:
        raise ArgumentError("heads", "one (layer, head) or more", 0)
    return torch.stack(chosen).mean(0)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole; 0 where whole is."""
    return (part / whole.masked_fill(whole == 0, 1.0)).masked_fill(whole == 0, 0.0)


def _ranks(maps: Tensor, real: Tensor) -> Tensor:
    """Ranks within rows of (…,T), equal cells at the mean of theirs; cells that are not real come
    after all others.
    """
    held = maps.masked_fill(~real, torch.inf)
    ordered = held.sort(-1).values.contiguous()
    held = held.contiguous()
    below = torch.searchsorted(ordered, held)
    upto = torch.searchsorted(ordered, held, right=True)
    return (below + upto).to(maps.dtype) / 2


def _largest(maps: Tensor, real: Tensor, k: int) -> Tensor:
    """Whether a cell of (…,T) is one of the k largest real ones of its row."""
    held = maps.masked_fill(~real, -torch.inf)
    index = torch.sort(held, dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(real).scatter(-1, index, True) & real


def _kept(a: Tensor, b: Tensor, real: Tensor | None) -> Tensor:
    """Which cells count, of the shape of both maps together."""
    if a.ndim < 2 or b.ndim < 2 or a.shape[-2:] != b.shape[-2:]:
        raise ArgumentError("maps", "two of (…,I,T)", (tuple(a.shape), tuple(b.shape)))
    every = torch.ones((), dtype=torch.bool, device=a.device) if real is None else real
    return every.expand(torch.broadcast_shapes(a.shape, b.shape))
