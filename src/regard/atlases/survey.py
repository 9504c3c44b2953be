"""Measuring every head of a model in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.atlases.record import Atlas, Row
from regard.core.catalog import probe_cards
from regard.core.errors import ArgumentError
from regard.core.hosting import host_of
from regard.core.incoming import Chosen
from regard.core.moment import Moment
from regard.core.probe import Finding, Probe, Tally, look_at, observed
from regard.core.treatment import Treatment


class _Means:
    """Sums over sequences of what was found at each site; NaN stands for nothing to measure."""

    def __init__(self) -> None:
        self.total: dict[tuple[str, int, str], Tensor] = {}
        self.count: dict[tuple[str, int, str], Tensor] = {}

    def add(self, tower: str, layer: int, values: Mapping[str, Tensor]) -> None:
        """Take in values (B,H,…) by name."""
        for name, x in values.items():
            key, there = (tower, layer, name), ~x.isnan()
            total, count = x.nan_to_num(0.0).sum(0).cpu(), there.sum(0).cpu()
            self.total[key] = self.total.get(key, torch.zeros_like(total)) + total
            self.count[key] = self.count.get(key, torch.zeros_like(count)) + count


@dataclass(frozen=True, eq=False)
class _Watching(Treatment):
    """Shows every call to the probes; changes nothing."""

    probes: Sequence[Probe]
    metrics: _Means
    profiles: _Means
    tokens: list[Tensor | None]

    def attention(self, at: Moment) -> None:
        tallies: list[Tally] = [p.begin(look_at(at, self.tokens[0])) for p in self.probes]
        for seen in observed(at):
            for tally in tallies:
                tally.add(seen)
        for tally in tallies:
            found: Finding = tally.found()
            self.metrics.add(at.site.tower, at.site.layer, found.metrics)
            self.profiles.add(at.site.tower, at.site.layer, found.profiles)


@torch.no_grad()
def atlas(
    model: Any, batches: Iterable[Mapping[str, Any]], probes: Sequence[Probe] | None = None
) -> Atlas:
    """Measure every self-attention head of a model that a host can reach.

    batches: keyword arguments of one forward each; `input_ids` among them are the tokens that
    copying probes compare. probes: which; None: all of the library.

    Raises:
        ArgumentError: no batch.
        UnsupportedError: a model no host knows.
    """
    chosen = [card.build() for card in probe_cards().values()] if probes is None else list(probes)
    host = host_of(model)
    watch = _Watching(chosen, _Means(), _Means(), [None])
    steps = {
        site.name: [Chosen(0, watch, tuple(range(site.heads)), frozenset({"prefill"}))]
        for site in host.sites(model)
        if not site.cross
    }
    seen = 0
    with host.run(model, steps):
        for batch in batches:
            tokens = batch.get("input_ids")
            watch.tokens[0] = tokens if isinstance(tokens, Tensor) else None
            model(**batch)
            seen += 1
    if not seen:
        raise ArgumentError("batches", "at least one", 0)
    return Atlas(type(model).__name__, _rows(watch.metrics), _stacked(watch.profiles))


def _rows(means: _Means) -> tuple[Row, ...]:
    rows = []
    for (tower, layer, metric), total in means.total.items():
        for head, (value, n) in enumerate(
            zip(total.tolist(), means.count[tower, layer, metric].tolist(), strict=True)
        ):
            rows.append(Row(tower, layer, head, metric, value / n if n else float("nan"), n))
    return tuple(rows)


def _stacked(means: _Means) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    for (tower, layer, name), total in means.total.items():
        mean = (total / means.count[tower, layer, name].clamp_min(1)).float()
        found.setdefault(f"{tower}/{name}", []).append(mean)
    longest = {key: max(x.shape[-1] for x in parts) for key, parts in found.items()}
    return {
        key: torch.stack([F.pad(x, (0, longest[key] - x.shape[-1])) for x in parts])
        for key, parts in found.items()
    }
