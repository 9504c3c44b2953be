"""The tables of an atlas's page: strongest heads, sinks, types, and what differs from another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from regard.report.towers import Numbers, Tower, ordered

STRONGEST = 6
"""Heads named per metric."""
SINKS = 16
"""Rows of the table of sinks."""
CHANGED = 12
"""Heads named among those that changed most."""
CELLS = 6_000
"""Cells of the table of all heads for readers without scripts; a larger one is left out."""


@dataclass(frozen=True)
class Named:
    """A head, where its page is, and one of its numbers (and that of another atlas)."""

    place: str
    anchor: str
    value: float
    other: float = math.nan


@dataclass(frozen=True)
class Summary:
    """One metric over the heads of a tower."""

    metric: str
    meaning: str
    least: float
    mean: float
    most: float
    strongest: tuple[Named, ...]


@dataclass(frozen=True)
class Change:
    """One metric in two atlases. apart: mean distance between a head's two numbers. heads: those
    that changed most, with both numbers.
    """

    metric: str
    meaning: str
    mean: float
    other: float
    apart: float
    heads: tuple[Named, ...]


@dataclass(frozen=True)
class Moved:
    """A head that changed. by: mean change of its metrics, each in standard deviations over the
    heads of both atlases; most: the metrics that changed most, with both numbers.
    """

    head: Named
    by: float
    most: tuple[Named, ...]


def named(tower: Tower, place: tuple[int, int], value: float, other: float = math.nan) -> Named:
    """A head with its link."""
    layer, head = place
    return Named(f"{layer}.{head}", tower.anchor(layer, head), float(value), float(other))


def summaries(tower: Tower, meanings: Mapping[str, str]) -> list[Summary]:
    """Every metric that was measured, with its strongest heads."""
    found = []
    for metric in tower.plain:
        values = tower.values[metric]
        if np.isnan(values).all():
            continue
        heads = [named(tower, at, values[at]) for at in tower.strongest(metric, STRONGEST)]
        spread = (float(np.nanmin(values)), float(np.nanmean(values)), float(np.nanmax(values)))
        found.append(Summary(metric, meanings.get(metric, ""), *spread, tuple(heads)))
    return found


def sinks(tower: Tower) -> tuple[list[str], list[tuple[Named, list[float]]]]:
    """The metrics about sinks, and the heads with most of the first of them."""
    metrics = [name for name in tower.plain if name.startswith("sink")]
    if not metrics:
        return [], []
    places = tower.strongest(metrics[0], SINKS)
    rows = [
        (
            named(tower, at, tower.values[metrics[0]][at]),
            [float(tower.values[m][at]) for m in metrics],
        )
        for at in places
    ]
    return metrics, rows


def every_head(tower: Tower) -> list[tuple[Named, list[float]]]:
    """All heads with all their metrics; nothing if that would be too long to read."""
    places = [(int(layer), int(head)) for layer, head in np.argwhere(tower.there)]
    if len(places) * len(tower.values) > CELLS:
        return []
    return [
        (named(tower, at, 0.0), [float(values[at]) for values in tower.values.values()])
        for at in places
    ]


def shared(tower: Tower, other: Tower) -> dict[str, tuple[Numbers, Numbers]]:
    """Metrics of both towers, on the layers and heads of both."""
    part = np.s_[: min(tower.layers, other.layers), : min(tower.heads, other.heads)]
    return {
        name: (tower.values[name][part], other.values[name][part])
        for name in tower.plain
        if name in other.values
    }


def changes(tower: Tower, other: Tower, meanings: Mapping[str, str]) -> list[Change]:
    """Every metric of both, with the heads in which they differ most."""
    found = []
    for metric, (mine, theirs) in shared(tower, other).items():
        apart = np.abs(theirs - mine)
        if np.isnan(apart).all():
            continue
        places = ordered(apart, STRONGEST)
        heads = tuple(named(tower, at, mine[at], theirs[at]) for at in places if apart[at] > 0)
        means = (float(np.nanmean(mine)), float(np.nanmean(theirs)), float(np.nanmean(apart)))
        found.append(Change(metric, meanings.get(metric, ""), *means, heads))
    return found


def moved(tower: Tower, other: Tower) -> list[Moved]:
    """The heads that changed most over all metrics."""
    pairs = shared(tower, other)
    scaled = {}
    for metric, both in pairs.items():
        every = np.stack(both)
        spread = float(np.nanstd(every)) if not np.isnan(every).all() else 0.0
        if spread > 0:
            scaled[metric] = np.abs(both[1] - both[0]) / spread
    if not scaled:
        return []
    stacked = np.stack(list(scaled.values()))
    known = ~np.isnan(stacked)
    mean = np.where(known, stacked, 0.0).sum(0) / np.maximum(known.sum(0), 1)
    return [_moved(tower, at, float(mean[at]), scaled, pairs) for at in ordered(mean, CHANGED)]


def _moved(
    tower: Tower,
    at: tuple[int, int],
    by: float,
    scaled: Mapping[str, Numbers],
    pairs: Mapping[str, Sequence[Numbers]],
) -> Moved:
    names = sorted((m for m in scaled if scaled[m][at] > 0), key=lambda m: -scaled[m][at])[:3]
    most = tuple(
        Named(m, tower.anchor(*at), float(pairs[m][0][at]), float(pairs[m][1][at])) for m in names
    )
    return Moved(named(tower, at, by), by, most)
