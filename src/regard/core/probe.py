"""Probes: what a head does, measured from its attention calls without a matrix of all weights, or
by changing it and looking at what the model then does.

A probe is a frozen dataclass of one of two kinds. A reading begins a tally for each call of a
layer, is shown the weights tile by tile, and gives numbers per sequence and head; the same reading
takes tiles streamed from a model (`observed`) and whole matrices (`tile`). An experiment is given
the model and its passages (core/scene.py), and runs it as often as it must.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from regard.core.card import Claim, Documented, Golden, Paper
from regard.core.errors import UnsupportedError
from regard.core.moment import Moment, Site
from regard.core.observe import Seen
from regard.core.passage import Passage
from regard.core.scene import Scene
from regard.core.shown import tile


@dataclass(frozen=True, eq=False)
class Look:
    """One attention call as a reading sees it.

    heads: how many. queries (B,N) and keys (B,M): numbers of real tokens before each. real_queries
    (B,N) and real_keys (B,M): False on padding. tokens (B,M): ids of the keys, where known. roles:
    name -> (B,M), what keys are for, where known. grid (h,w): the keys after `prefix` others are
    those of an image. at: the call itself, with q, k, v. output (B,H,N,E): what the heads give.
    stream (B,N,C): the residual stream as it enters the block. cross: keys of another sequence.
    """

    heads: int
    queries: Tensor
    keys: Tensor
    real_queries: Tensor
    real_keys: Tensor
    tokens: Tensor | None = None
    roles: Mapping[str, Tensor] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    prefix: int = 0
    at: Moment | None = None
    output: Tensor | None = None
    stream: Tensor | None = None
    cross: bool = False

    def same_sequence(self, who: str) -> None:
        """Raise UnsupportedError where queries and keys are of two sequences."""
        if self.cross:
            raise UnsupportedError(who, "queries and keys are of two sequences")

    def role(self, name: str, who: str) -> Tensor:
        """Which keys (B,M) have a role.

        Raises:
            UnsupportedError: nothing says so.
        """
        if name not in self.roles:
            raise UnsupportedError(who, f"nothing says which keys are of role {name!r}")
        return self.roles[name]


@dataclass(frozen=True, eq=False)
class Finding:
    """metrics: name -> (B,H). profiles: name -> (B,H,n), curves of a head. layers: name -> (B,),
    numbers of the layer as a whole. NaN where a sequence has nothing to measure.
    """

    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    profiles: Mapping[str, Tensor] = field(default_factory=dict)
    layers: Mapping[str, Tensor] = field(default_factory=dict)


class Tally(Protocol):
    """What a probe keeps while weights pass by."""

    def add(self, seen: Seen) -> None:
        """Take in one tile."""
        ...

    def found(self) -> Finding:
        """The numbers, once every row was seen."""
        ...


class Reading(Protocol):
    """A measurement of heads from their weights."""

    def begin(self, look: Look) -> Tally:
        """A tally for one call.

        Raises:
            UnsupportedError: the call lacks what this reading needs.
        """
        ...


class Experiment(Protocol):
    """A measurement that runs the model itself."""

    def run(self, scene: Scene) -> Iterator[tuple[Passage | None, Site, Finding]]:
        """What was found in each passage (None: in all of them together) at each site, in any
        number of pieces that are averaged.

        Raises:
            ArgumentError, UnsupportedError: the model or the passages lack what it needs.
        """
        ...


Probe = Reading | Experiment


@dataclass(frozen=True)
class ProbeCard(Documented):
    """One probe: its name, what its metrics mean, where it comes from.

    build: a frozen dataclass that is a Reading or an Experiment; its fields are the options.
    metrics, profiles, layers: name -> meaning, units included.
    """

    name: str
    build: Callable[..., Probe]
    papers: tuple[Paper, ...]
    claim: Claim
    metrics: Mapping[str, str] = field(default_factory=dict)
    profiles: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)
    goldens: tuple[Golden, ...] = ()

    @property
    def kind(self) -> Literal["reading", "experiment"]:
        """How it measures: by watching one forward, or by running the model itself."""
        return "reading" if hasattr(self.build, "begin") else "experiment"

    @property
    def evidence(self) -> str:
        """Golden > exact (known answers, which the tests hold)."""
        return "golden" if self.goldens else "exact"


def look_at(at: Moment) -> Look:
    """A reading's view of a call whose keys are those of the dense cache."""
    batch, m = at.q.shape[0], at.k.shape[2]
    keys, real = (x.expand(batch, -1, m)[:, 0] for x in (at.key_positions, at.real))
    return Look(
        at.q.shape[1],
        at.query_positions,
        keys,
        at.query_real,
        real,
        at=at,
        cross=at.site.cross,
    )


def plain_look(weights: Tensor, tokens: Tensor | None = None) -> Look:
    """The view of matrices (B,H,N,M) of a sequence without padding; the last query is the last
    key.
    """
    b, h, n, m = weights.shape
    keys = torch.arange(m).expand(b, -1)
    every = torch.ones(b, m, dtype=torch.bool)
    return Look(h, keys[:, m - n :], keys, every[:, m - n :], every, tokens)


def measured(
    probe: Reading, weights: Tensor, tokens: Tensor | None = None, *, causal: bool = True
) -> Finding:
    """A reading's numbers for whole matrices (B,H,N,M)."""
    tally = probe.begin(plain_look(weights, tokens))
    tally.add(tile(weights, causal))
    return tally.found()


def add_rows(total: Tensor, seen: Seen, values: Tensor) -> None:
    """Add values (b,h or 1,n) of a tile's rows to total (B,H,N)."""
    total[seen.batch, seen.heads, seen.rows] += values


def add_columns(total: Tensor, seen: Seen, values: Tensor) -> None:
    """Add values (b or 1,h or 1,m) of a tile's keys to total (B,H,M)."""
    part = total[seen.batch, seen.heads]
    if isinstance(seen.keys, slice):
        part[..., seen.keys] += values
    else:
        values = values.to(part.dtype).expand(*part.shape[:2], -1)
        part.index_add_(-1, seen.keys, values)


def of_keys(x: Tensor, seen: Seen) -> Tensor:
    """The entries of x (B,M) that belong to a tile: (b,1,1,m)."""
    return x[seen.batch][:, seen.keys][:, None, None]


def of_rows(x: Tensor, seen: Seen) -> Tensor:
    """The entries of x (B,N) that belong to a tile: (b,1,n,1)."""
    return x[seen.batch, seen.rows][:, None, :, None]


def mean_of_rows(values: Tensor, real: Tensor) -> Tensor:
    """Mean of (B,H,N) over the real queries (B,N): (B,H)."""
    kept = values.masked_fill(~real[:, None], 0.0).sum(-1)
    return kept / real.sum(-1).clamp_min(1)[:, None]


def zeros(look: Look, length: int, *more: Any) -> Tensor:
    """A total (B,H,length,…) in double precision."""
    return torch.zeros(
        len(look.keys), look.heads, length, *more, dtype=torch.float64, device=look.keys.device
    )
