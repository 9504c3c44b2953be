r"""Tree search: the blocks of keys a block of queries likes best, found by halving intervals.

    m intervals cover the blocks;  repeat: halve each, score a half by one block of it, keep the m
    best halves of the 2m;  until each is one block

A half's score is the greatest q·k between the queries and the keys of its representative: its
centre, first or last block, or ("oracle") all of them. O(m log C) blocks of C are scored, and where
scores are smooth in position the best are found. Up to m blocks, all are taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import Literal

import torch
from torch import Tensor

from regard.core.rows import take_rows
from regard.core.selected import Choice

Representative = Literal["center", "first", "last", "oracle"]


@dataclass(frozen=True, eq=False)
class Search:
    """What is searched, and how.

    q (B,H,T,s,D): s queries of each of T blocks; there (B,T,s): which of them count. k
    (B,H_k,M,D): keys in sequence. reach (B,T): keys a block may see; searched (B,T): keys the
    tree covers, at most as many. keep: keys to find.
    """

    q: Tensor
    there: Tensor
    k: Tensor
    reach: Tensor
    searched: Tensor
    keep: int
    block: int
    representative: Representative = "center"

    @property
    def count(self) -> int:
        """Blocks of keys; the last may be cut short."""
        return -(-self.k.shape[2] // self.block)

    def scores(self, keys: Tensor) -> Tensor:
        """Greatest q·k of the blocks `keys` (B,H,T,w), (B,H,T,w)."""
        tokens = keys[..., None] * self.block + torch.arange(self.block, device=keys.device)
        tokens = tokens.flatten(-2)
        near = take_rows(self.k, tokens.clamp_max(self.k.shape[2] - 1))
        scores = self.q @ near.mT  # (B,H,T,s,w*block)
        hidden = (tokens >= self.reach[:, None, :, None])[..., None, :]
        scores = scores.masked_fill(hidden | ~self.there[:, None, :, :, None], float("-inf"))
        return scores.amax(-2).unflatten(-1, (-1, self.block)).amax(-1)


def tree_search(search: Search) -> Choice:
    """The blocks found, in their order, (B,H,T,min(ceil(keep/block), C))."""
    wanted = min(ceil(search.keep / search.block), search.count)
    blocks = (search.searched + search.block - 1).div(search.block, rounding_mode="floor")
    number = torch.arange(wanted + 1, device=blocks.device)
    edges = (blocks.double()[..., None] / max(wanted, 1) * number).long()
    shape = (*search.q.shape[:3], wanted)
    start, size = (x[:, None].expand(shape) for x in (edges[..., :-1], edges.diff()))
    table = _maxima(search) if search.representative == "oracle" else None
    for _ in range(ceil(log2(search.count / wanted)) if wanted else 0):
        start, size = _halved(start, size)
        if table is None:
            scores = search.scores(start + _offset(size, search.representative))
        else:
            scores = _range_max(table, start, size)
        scores = scores.masked_fill(size < 1, float("-inf"))
        order = scores.argsort(dim=-1, descending=True, stable=True)
        start, size = (x.gather(-1, order[..., :wanted]) for x in (start, size))
    few = (search.searched <= search.keep)[:, None, :, None]
    index = torch.where(few, number[:-1], start.sort(-1).values)
    return Choice(index, (~few | (number[:-1] < blocks[:, None, :, None])).expand(shape))


def holds(found: Choice, blocks: Tensor) -> Tensor:
    """Whether `blocks` (B,1 or H,T,w) are among those found, (B,H,T,w)."""
    blocks = blocks.expand(*found.index.shape[:3], -1).contiguous()
    if 0 in (found.index.shape[-1], blocks.shape[-1]):
        return torch.zeros_like(blocks, dtype=torch.bool)
    sought = found.index.masked_fill(~found.valid, torch.iinfo(found.index.dtype).max)
    place = torch.searchsorted(sought, blocks).clamp_max(sought.shape[-1] - 1)
    return sought.gather(-1, place) == blocks


def _halved(start: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of each interval (…,m), the lesser first: (…,2m)."""
    half = size.div(2, rounding_mode="floor")
    starts, sizes = torch.stack([start, start + half], -1), torch.stack([half, size - half], -1)
    return starts.flatten(-2), sizes.flatten(-2)


def _offset(size: Tensor, representative: Representative) -> Tensor:
    """Which block of an interval speaks for it."""
    if representative == "first":
        return torch.zeros_like(size)
    if representative == "last":
        return (size - 1).clamp_min(0)
    return size.div(2, rounding_mode="floor")


def _maxima(search: Search) -> Tensor:
    """Greatest scores of the blocks c … c + 2^l - 1, (B,H,T,L,C), for every l."""
    keys = torch.arange(search.count, device=search.k.device)
    rows = [search.scores(keys.expand(*search.q.shape[:3], -1))]
    while 2 ** len(rows) <= search.count:
        last, step = rows[-1], 2 ** (len(rows) - 1)
        wider = torch.maximum(last[..., :-step], last[..., step:])
        rows.append(torch.cat([wider, last[..., -step:]], -1))
    return torch.stack(rows, -2)


def _range_max(table: Tensor, start: Tensor, size: Tensor) -> Tensor:
    """Greatest score within start … start + size - 1, (B,H,T,w); any for an empty interval."""
    level = size.clamp_min(1).double().log2().long()
    flat, width = table.flatten(-2), table.shape[-1]
    left = level * width + start.clamp_max(width - 1)
    right = (left + size.clamp_min(1) - 2**level).clamp_max(flat.shape[-1] - 1)
    return torch.maximum(flat.gather(-1, left), flat.gather(-1, right))
