"""What the page of an atlas shows of one tower besides its map: types, tables and charts."""

from __future__ import annotations

from dataclasses import dataclass

from regard.atlases.record import Atlas
from regard.report.atlas_tables import (
    Change,
    Moved,
    Named,
    Summary,
    changes,
    every_head,
    moved,
    named,
    sinks,
    summaries,
)
from regard.report.head_types import Type, head_types
from regard.report.lines import LineChart, line_chart
from regard.report.towers import Tower

NAMED = 24
"""Heads named per type; the page of each head names its types."""


@dataclass(frozen=True)
class Kind:
    """A type of heads in the words of a page, with the first of its heads."""

    type: Type
    heads: tuple[Named, ...]


@dataclass(frozen=True)
class Part:
    """What a page shows of one tower."""

    tower: Tower
    kinds: tuple[Kind, ...]
    summaries: tuple[Summary, ...]
    sink_metrics: tuple[str, ...]
    sinks: tuple[tuple[Named, list[float]], ...]
    heads: tuple[tuple[Named, list[float]], ...]
    charts: tuple[tuple[str, LineChart], ...]
    changes: tuple[Change, ...]
    moved: tuple[Moved, ...]


def part_of(atlas: Atlas, tower: Tower, other: Tower | None) -> Part:
    """All that is shown of a tower, beside that of another atlas where there is one."""
    metrics, rows = sinks(tower)
    return Part(
        tower=tower,
        kinds=tuple(
            Kind(kind, tuple(named(tower, at, 0.0) for at in kind.heads[:NAMED]))
            for kind in head_types(tower)
        ),
        summaries=tuple(summaries(tower, atlas.meanings)),
        sink_metrics=tuple(metrics),
        sinks=tuple(rows),
        heads=tuple(every_head(tower)),
        charts=tuple(_charts(atlas, tower, other)),
        changes=() if other is None else tuple(changes(tower, other, atlas.meanings)),
        moved=() if other is None else tuple(moved(tower, other)),
    )


def _charts(atlas: Atlas, tower: Tower, other: Tower | None) -> list[tuple[str, LineChart]]:
    """A chart per metric of layers, one line per kind of data, or per atlas, with its meaning."""
    found = []
    for metric in (name for name in tower.of_layers if "@" not in name):
        if other is None:
            lines = {
                name.partition("@")[2] or "all": values
                for name, values in tower.of_layers.items()
                if name.partition("@")[0] == metric
            }
        else:
            lines = {"first": tower.of_layers[metric]}
            if metric in other.of_layers:
                lines["second"] = other.of_layers[metric]
        points = {name: list(enumerate(x.tolist())) for name, x in lines.items()}
        titles = (f"{metric} by layer", "layer", metric)
        chart = line_chart(titles, points, width=300, height=190, whole=True)
        found.append((atlas.meanings.get(metric, ""), chart))
    return found
