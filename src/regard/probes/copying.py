r"""Copying: heads that look at the token before, at the same token earlier, and at what came after
it then.

    previous_i = A_{i,i-1}        duplicate_i = sum_{j<i, x_j = x_i} A_ij
    induction_i = sum_{j<=i, x_{j-1} = x_i} A_ij        x: token ids

Duplicate and induction are means over the queries that have such a key; previous over all but the
first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.observe import Seen
from regard.core.probe import Finding, Look, ProbeCard, add_rows, of_keys, of_rows, zeros
from regard.core.tile_sums import along_keys, before, equal, past


@dataclass(frozen=True)
class Copying:
    """Previous-token, duplicate-token and induction scores; the last two where ids are known."""

    def begin(self, look: Look) -> _Sources:
        look.same_sequence("copying")
        return _Sources(look)


class _Sources:
    def __init__(self, look: Look) -> None:
        n = look.queries.shape[1]
        self.look = look
        self.previous, self.duplicate, self.induction = (zeros(look, n) for _ in range(3))
        self.ids: tuple[Tensor, Tensor, Tensor] | None = None
        if look.tokens is not None:
            ids = look.tokens.unique(return_inverse=True)[1]
            self.ids = ids, _before(look, ids), ids[:, ids.shape[1] - n :]

    def add(self, seen: Seen) -> None:
        look = self.look
        queries = of_rows(look.queries, seen)
        ends = before(seen, look, queries[:, 0] + torch.tensor([-1, 0], device=queries.device))
        add_rows(self.previous, seen, ends[..., 1] - ends[..., 0])
        if self.ids is None:
            return
        cut, (here, prior, own) = past(seen, look), self.ids
        keys = of_keys(look.keys, seen)[..., cut:]
        same, after = equal(seen, here, own), equal(seen, prior, own)
        same[..., cut:] *= keys < queries
        after[..., cut:] *= keys <= queries
        add_rows(self.duplicate, seen, along_keys(seen.weights, same))
        add_rows(self.induction, seen, along_keys(seen.weights, after))

    def found(self) -> Finding:
        look = self.look
        later = look.real_queries & (look.queries > 0)
        metrics = {"previous_token": _mean_where(self.previous, later)}
        if look.tokens is not None:
            again = later & _seen_before(look, look.tokens)
            metrics["duplicate_token"] = _mean_where(self.duplicate, again)
            metrics["induction"] = _mean_where(self.induction, again)
        return Finding(metrics)


def _before(look: Look, tokens: Tensor) -> Tensor:
    """The token before each key (B,M), -1 before the first real one."""
    before = torch.cat([torch.full_like(tokens[:, :1], -1), tokens[:, :-1]], 1)
    return before.masked_fill(look.keys == 0, -1)


def _seen_before(look: Look, tokens: Tensor) -> Tensor:
    """Which queries (B,N) hold a token that occurred earlier."""
    marked = tokens.masked_fill(~look.real_keys, -2)
    order = marked.argsort(dim=-1, stable=True)
    ranked = marked.gather(1, order)
    repeated = torch.cat([torch.zeros_like(ranked[:, :1]), ranked[:, 1:] == ranked[:, :-1]], 1)
    found = torch.zeros_like(marked, dtype=torch.bool).scatter_(1, order, repeated.bool())
    return found[:, tokens.shape[1] - look.queries.shape[1] :]


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Mean of (B,H,N) over some queries (B,N); NaN where there is none."""
    total = values.masked_fill(~where[:, None], 0.0).sum(-1)
    return total / where.sum(-1)[:, None]


CARD = ProbeCard(
    name="copying",
    build=Copying,
    metrics={
        "previous_token": "weight on the token before",
        "duplicate_token": "weight on earlier occurrences of the same token",
        "induction": "weight on what followed them",
    },
    papers=(Paper("2209.11895", "In-context Learning and Induction Heads", 2022),),
    claim=Claim("a model that copies has induction heads", "regard atlas"),
)
