"""The report of an atlas: a map of heads per metric, a page per head, and what differs from another
atlas.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from regard.atlases.record import Atlas
from regard.core.catalog import probe_cards
from regard.report.atlas_data import plain_atlas, script_json
from regard.report.atlas_parts import Part, part_of
from regard.report.chart import SHAPES
from regard.report.colours import DIVERGING, SEQUENTIAL
from regard.report.page import page, write_page
from regard.report.towers import Tower, domains, towers

OWN = ("atlas.css", "drawing.js", "head.js", "atlas.js")
MOST = 4
"""Heads that the first lines of a comparison name."""
COSTS = ("ablation", "influence", "gradient")
"""Probes whose metrics say what a model loses without a head."""


def atlas_html(atlas: Atlas, other: Atlas | None = None) -> str:
    """One self-contained HTML page of an atlas, or of two side by side.

    Raises:
        ArgumentError: `other` has no tower, or no head and metric of one, in common with the atlas.
    """
    mine = towers(atlas)
    theirs = {} if other is None else {tower.name: tower for tower in towers(other)}
    if other is not None:
        atlas.compare(other)
        mine = [tower for tower in mine if tower.name in theirs]
    twins = [theirs[tower.name] for tower in mine if tower.name in theirs]
    parts = [part_of(atlas, tower, theirs.get(tower.name)) for tower in mine]
    both = [atlas] if other is None else [atlas, other]
    labels = _labels(both)
    return page(
        "atlas.html.j2",
        {
            "title": " and ".join(labels),
            "labels": labels,
            "comparing": other is not None,
            "finding": _finding(parts),
            "facts": _facts(atlas, mine),
            "parts": parts,
            "notes": [(label, a.notes) for label, a in zip(labels, both, strict=True)],
            "making": [
                (label, [(name, _plain(value)) for name, value in a.about.items()])
                for label, a in zip(labels, both, strict=True)
            ],
            "probes": _probes(atlas),
            "shapes": SHAPES,
            "data": script_json(_data(both, mine, twins)),
        },
        OWN,
    )


def write_atlas_page(
    atlas: Atlas, path: str | os.PathLike[str], other: Atlas | None = None
) -> None:
    """Write the page of an atlas, or of two side by side, to a file, whole or not at all.

    Raises:
        ArgumentError: as `atlas_html`; or the path is not a file in an existing folder.
    """
    write_page(atlas_html(atlas, other), path)


def _data(both: Sequence[Atlas], mine: Sequence[Tower], twins: Sequence[Tower]) -> dict[str, Any]:
    """All that the page's script is given; `twins` are the towers of the second atlas."""
    first = both[0]
    metrics = list(dict.fromkeys(name for tower in mine for name in tower.plain))
    groups = _groups(metrics)
    return {
        "labels": _labels(both),
        "metrics": {name: first.meanings.get(name, "") for name in metrics},
        "domains": domains(name for tower in mine for name in tower.values),
        "groups": groups,
        "ablations": [name for group, names in groups if group in COSTS for name in names],
        "alone": mine[0].alone,
        "sequential": SEQUENTIAL,
        "diverging": DIVERGING,
        "atlases": [plain_atlas(a, own) for a, own in zip(both, (mine, twins), strict=False)],
    }


def _groups(metrics: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The metrics by the probe that measures them, in the order of the atlas."""
    owners = {metric: name for name, card in probe_cards().items() for metric in card.metrics}
    found: dict[str, list[str]] = {}
    for metric in metrics:
        found.setdefault(owners.get(metric, "others"), []).append(metric)
    return list(found.items())


def _labels(both: Sequence[Atlas]) -> list[str]:
    """What the atlases are called: their models, told apart where they are alike."""
    names = [atlas.model for atlas in both]
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({which})" for name, which in zip(names, ("first", "second"), strict=True)]


def _probes(atlas: Atlas) -> list[tuple[str, str, str]]:
    """The probes behind the metrics: name, what it measures, and where it comes from."""
    known = {row.metric.partition("@")[0] for row in atlas.rows}
    found = []
    for name, card in probe_cards().items():
        if known & {*card.metrics, *card.layers}:
            papers = "; ".join(f"{p.title} ({p.year}), {p.url}" for p in card.papers)
            found.append((name, card.summary, papers))
    return found


def _finding(parts: Sequence[Part]) -> str:
    """What was found, in numbers."""
    return " ".join(_told(part) for part in parts)


def _told(part: Part) -> str:
    """One tower in numbers: its types of heads, or, beside another atlas, what changed most."""
    tower = part.tower
    where = "" if tower.alone else f"{tower.name}: "
    said = f"{where}{int(np.sum(tower.there)):,} heads in {tower.layers:,} layers"
    if part.changes:
        most = ", ".join(row.head.place for row in part.moved[:MOST])
        return f"{said}; most changed: {most}." if most else f"{said}; none changed."
    kinds = [f"{k.type.rule.name} {len(k.type.heads):,}" for k in part.kinds if k.type.heads]
    return f"{said}; by type: {', '.join(kinds)}." if kinds else f"{said}."


def _facts(atlas: Atlas, mine: Sequence[Tower]) -> list[tuple[str, str]]:
    """The setting in a few numbers."""
    metrics = {name for tower in mine for name in (*tower.plain, *tower.of_layers)}
    kinds = domains(name for tower in mine for name in tower.values)
    facts = [("metrics", str(len({name for name in metrics if "@" not in name})))]
    facts += [("kinds of data", ", ".join(kinds))] if kinds else []
    wanted = ("passages", "tokens")
    return [*facts, *((n, _plain(atlas.about[n])) for n in wanted if n in atlas.about)]


def _plain(value: object) -> str:
    """A value of an atlas's circumstances as text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
