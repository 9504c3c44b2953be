r"""Distance: how far a head looks.

    d_i = sum_j A_ij |i - j|        near_i = sum_{|i - j| <= near} A_ij

i and j count real tokens. The profile is the weight at distances 0, 1, 2-3, 4-7, … (powers of two),
averaged over queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

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

    def add(self, seen: Seen) -> None:
        weights = seen.weights.double()
        gap = (of_rows(self.look.queries, seen) - of_keys(self.look.keys, seen)).abs()
        add_rows(self.far, seen, (weights * gap).sum(-1))
        add_rows(self.near, seen, (weights * (gap <= self.probe.near)).sum(-1))
        which = torch.where(gap > 0, gap.clamp_min(1).double().log2().floor().long() + 1, 0)
        which = which.clamp_max(self.probe.bins - 1)
        part = self.bins[seen.batch, seen.heads, seen.rows]
        part.scatter_add_(-1, which.expand_as(weights), weights)

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
