r"""Distance: how far a head looks.

    d_i = sum_j A_ij |i - j|        near_i = sum_{|i - j| <= near} A_ij

i and j count real tokens. The profile is the weight at distances 0, 1, 2-3, 4-7, … (powers of two),
averaged over queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.observe import Seen
from regard.core.probe import (
    Finding,
    Look,
    ProbeCard,
    add_rows,
    mean_of_rows,
    of_keys,
    of_rows,
    zeros,
)
from regard.core.tile_sums import along_keys, before


@dataclass(frozen=True)
class Distance:
    """near: tokens within which weight counts as local. bins: of the profile; the last takes all
    that is further.
    """

    near: int = 8
    bins: int = 16

    def __post_init__(self) -> None:
        if self.near < 0 or self.bins < 2:
            raise ArgumentError("Distance", "near of at least 0, at least 2 bins", self)

    def begin(self, look: Look) -> _Reach:
        look.same_sequence("distance")
        return _Reach(self, look)


class _Reach:
    def __init__(self, probe: Distance, look: Look) -> None:
        n = look.queries.shape[1]
        self.probe, self.look = probe, look
        self.far, self.near = zeros(look, n), zeros(look, n)
        self.bins = zeros(look, n, probe.bins)
        powers = [2**bin for bin in range(probe.bins - 1)]
        self.steps = torch.tensor([*powers, probe.near + 1], device=look.keys.device)

    def add(self, seen: Seen) -> None:
        queries, keys = of_rows(self.look.queries, seen), of_keys(self.look.keys, seen)
        dtype = seen.weights.dtype
        add_rows(
            self.far, seen, along_keys(seen.weights, (queries.to(dtype) - keys.to(dtype)).abs_())
        )
        within = self.within(seen, queries[:, 0])
        add_rows(self.near, seen, within[..., -1])
        ends = torch.cat([within[..., :-1], seen.weights.sum(-1, keepdim=True)], -1)
        part = self.bins[seen.batch, seen.heads, seen.rows]
        part += ends.diff(dim=-1, prepend=torch.zeros_like(ends[..., :1]))

    def within(self, seen: Seen, queries: Tensor) -> Tensor:
        """Weight (b,h,n,k) at distances below each of the steps, of queries (b,n,1)."""
        low, high = queries - self.steps + 1, queries + self.steps
        return before(seen, self.look, high) - before(seen, self.look, low)

    def found(self) -> Finding:
        real = self.look.real_queries
        profile = torch.stack([mean_of_rows(x, real) for x in self.bins.unbind(-1)], -1)
        return Finding(
            {"distance": mean_of_rows(self.far, real), "local": mean_of_rows(self.near, real)},
            {"distance": profile},
        )


CARD = ProbeCard(
    name="distance",
    build=Distance,
    metrics={
        "distance": "mean distance to what is read, in tokens",
        "local": "weight within `near` tokens, 0 to 1",
    },
    profiles={"distance": "weight at distances 0, 1, 2-3, 4-7, …"},
    papers=(Paper("2303.13731", "How Does Attention Work in Vision Transformers?", 2023),),
    claim=Claim("local heads stand beside heads that look everywhere", "regard atlas"),
)
