r"""Drains: what is special about the key that a head parks on, and about its residual stream.

    value_first = |v_0| / median_j |v_j|        value_top = |v_t| / median_j |v_j|
    key_first, key_top: the same of keys        stream_first = |x_0| / median_j |x_j|

0 is the first real key, t the one that gets most weight of all; medians are over the other real
keys. A head that parks to do nothing drains the value of its sink (below 1), while the residual
stream x, as it enters the block, has a peak there (above 1). stream_peak is the largest |x_j| over
the median of the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import UnsupportedError
from regard.core.moment import Moment
from regard.core.observe import Seen
from regard.core.probe import Finding, Look, ProbeCard, add_columns, zeros
from regard.core.weights import repeat_heads


@dataclass(frozen=True)
class Drains:
    """Norms of values, keys and residual states at the sink, relative to those elsewhere."""

    def begin(self, look: Look) -> _Norms:
        if look.at is None:
            raise UnsupportedError("drains", "the values of the call are not known")
        return _Norms(look, look.at)


class _Norms:
    def __init__(self, look: Look, at: Moment) -> None:
        self.look, self.at = look, at
        self.mass = zeros(look, look.keys.shape[1])

    def add(self, seen: Seen) -> None:
        add_columns(self.mass, seen, seen.mass)

    def found(self) -> Finding:
        look = self.look
        real = look.real_keys[:, None].expand_as(self.mass)
        first = first_of(look.keys, look.real_keys)[:, None].expand(-1, look.heads)
        top = self.mass.masked_fill(~real, -1.0).argmax(-1)
        metrics: dict[str, Tensor] = {}
        for name, x in (("value", self.at.v), ("key", self.at.k)):
            norms = repeat_heads(x.double().norm(dim=-1)[..., None], look.heads)[..., 0]
            metrics[f"{name}_first"] = over_others(norms, real, first)
            metrics[f"{name}_top"] = over_others(norms, real, top)
        return Finding(metrics, layers=self.stream())

    def stream(self) -> dict[str, Tensor]:
        """Peaks of the residual stream, where it is known."""
        look = self.look
        if look.stream is None or look.stream.shape[:2] != look.queries.shape:
            return {}
        norms, real = look.stream.double().norm(dim=-1), look.real_queries
        peak = norms.masked_fill(~real, -1.0).argmax(-1)
        return {
            "stream_first": over_others(norms, real, first_of(look.queries, real)),
            "stream_peak": over_others(norms, real, peak),
        }


def first_of(positions: Tensor, real: Tensor) -> Tensor:
    """Index (B,) of the first real token of positions (B,N)."""
    return positions.masked_fill(~real, positions.shape[-1]).argmin(-1)


def over_others(norms: Tensor, real: Tensor, index: Tensor) -> Tensor:
    """The norm (…,N) at an index (…) over the median of the other real ones; NaN if there is
    none.
    """
    own = norms.gather(-1, index[..., None])
    others = norms.masked_fill(~real, float("nan")).scatter(-1, index[..., None], float("nan"))
    return own[..., 0] / torch.nanmedian(others, -1).values


CARD = ProbeCard(
    name="drains",
    build=Drains,
    metrics={
        "value_first": "norm of the first key's value over the median of the others",
        "value_top": "norm of the most-read key's value over the median of the others",
        "key_first": "norm of the first key over the median of the others",
        "key_top": "norm of the most-read key over the median of the others",
    },
    layers={
        "stream_first": "norm of the first token's residual state over the median of the others",
        "stream_peak": "largest norm of a residual state over the median of the others",
    },
    papers=(
        Paper(
            "2410.13835",
            "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena "
            "in LLMs",
            2024,
        ),
        Paper(
            "2410.10781",
            "When Attention Sink Emerges in Language Models: An Empirical View",
            2024,
        ),
    ),
    claim=Claim("a sink has a small value, so that parking there does nothing", "regard atlas"),
)
