r"""Attention sinks: keys on which a head parks its attention.

    a_k = sum_i A_ik / n_k        n_k: queries that see key k
    sink at k: a_k > threshold, of keys that at least `viewers` queries see

With a causal mask and k counted from 0, n_k = T - k. The last keys are seen by few queries, so that
one glance would make them sinks; they are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regard.core.card import Claim, Golden, Paper
from regard.core.errors import ArgumentError
from regard.core.observe import Seen
from regard.core.probe import Finding, Look, ProbeCard, add_columns, measured, zeros


@dataclass(frozen=True)
class Sinks:
    """threshold: mean weight from which a key is a sink. viewers: queries that must see it. first:
    keys in the profile.
    """

    threshold: float = 0.3
    viewers: int = 8
    first: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1 or self.viewers < 1 or self.first < 1:
            raise ArgumentError("Sinks", "0 < threshold < 1, viewers and first at least 1", self)

    def begin(self, look: Look) -> _Received:
        return _Received(self, look)


class _Received:
    def __init__(self, probe: Sinks, look: Look) -> None:
        self.probe, self.look = probe, look
        self.mass, self.viewers = (zeros(look, look.keys.shape[1]) for _ in range(2))

    def add(self, seen: Seen) -> None:
        add_columns(self.mass, seen, seen.mass)
        add_columns(self.viewers, seen, seen.viewers)

    def found(self) -> Finding:
        share = self.mass / self.viewers.clamp_min(1)
        sink = (share > self.probe.threshold) & (self.viewers >= self.probe.viewers)
        ranks = self.look.keys.masked_fill(~self.look.real_keys, self.look.keys.shape[1])
        order = ranks.argsort(-1)[:, : self.probe.first]
        profile = share.gather(-1, order[:, None].expand(-1, self.look.heads, -1))
        metrics = {
            "sink_first": profile[..., 0] if profile.shape[-1] else share.sum(-1),
            "sink_any": sink.any(-1).double(),
            "sink_count": sink.sum(-1).double(),
        }
        return Finding(metrics, {"received": profile})


def importance(weights: Tensor) -> Tensor:
    """Mean weight (B,H,M) that each key gets from the queries that see it."""
    found = measured(Sinks(first=weights.shape[-1]), weights)
    return found.profiles["received"]


THRESHOLDS = (0.3, 0.3, 0.1)
"""Of the three sets of maps that every golden case holds; a case's own says one of them."""


def replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' importance and their percentage of sinks at each key."""
    found: dict[str, Tensor] = {}
    for index, threshold in enumerate(THRESHOLDS):
        maps = case["inputs"][f"A{index}"]
        share = importance(maps.flatten(0, 1)).unflatten(0, maps.shape[:2])
        above = (share > threshold).double().mean((0, 1, 2)) * 100
        found[f"importance{index}"] = share.to(maps.dtype)
        found[f"metric_percent{index}"] = above.float()
    return found


CARD = ProbeCard(
    name="sinks",
    build=Sinks,
    metrics={
        "sink_first": "mean weight on the first token, of queries that see it",
        "sink_any": "share of sequences with a sink anywhere",
        "sink_count": "sinks per sequence",
    },
    profiles={"received": "mean weight on each of the first tokens"},
    papers=(
        Paper(
            "2410.10781",
            "When Attention Sink Emerges in Language Models: An Empirical View",
            2024,
        ),
    ),
    claim=Claim("most heads of a trained model park on the first token", "regard atlas"),
    goldens=(
        Golden("32_sink_metric.pt", replay, "https://github.com/sail-sg/Attention-Sink", "af49727"),
    ),
)
