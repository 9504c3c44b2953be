"""The atlas as a record: a tidy table, profiles, files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from regard.atlases.example import Example, example_from
from regard.core.errors import ArgumentError, UnknownNameError

VERSION = 2


@dataclass(frozen=True)
class Row:
    """One metric of one head, or of a whole layer (head None): its mean over `n` sequences."""

    tower: str
    layer: int
    head: int | None
    metric: str
    value: float
    n: int


@dataclass(frozen=True, eq=False)
class Atlas:
    """What heads do. profiles: "tower/metric" -> (layers, heads, n). notes: probe -> why it could
    not be served. meanings: metric -> what it says. about: circumstances.
    """

    model: str
    rows: tuple[Row, ...]
    profiles: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    meanings: Mapping[str, str] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics of heads, in the order of the probes."""
        return list(dict.fromkeys(row.metric for row in self.rows if row.head is not None))

    @property
    def layer_metrics(self) -> list[str]:
        """Names of the metrics of layers."""
        return list(dict.fromkeys(row.metric for row in self.rows if row.head is None))

    @property
    def towers(self) -> list[str]:
        """The towers of attention that were read."""
        return list(dict.fromkeys(row.tower for row in self.rows))

    def table(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries."""
        return [asdict(row) for row in self.rows]

    def map(self, metric: str, tower: str | None = None) -> Tensor:
        """A metric as (layers, heads) of one tower (the first, unless it is said); NaN where it was
        not measured.

        Raises:
            UnknownNameError: no such metric or tower.
        """
        tower = next(iter(self.towers), "") if tower is None else tower
        for what, name, known in (
            ("metric", metric, self.metrics),
            ("tower", tower, self.towers),
        ):
            if name not in known:
                raise UnknownNameError(what, name, known)
        mine = [(r, r.head) for r in self.rows if r.tower == tower and r.head is not None]
        layers, heads = (max(x) + 1 for x in zip(*((r.layer, h) for r, h in mine), strict=True))
        found = torch.full((layers, heads), float("nan"))
        for row, head in mine:
            if row.metric == metric:
                found[row.layer, head] = row.value
        return found

    def layer_map(self, metric: str, tower: str | None = None) -> Tensor:
        """A metric of layers as (layers,) of one tower; NaN where it was not measured.

        Raises:
            UnknownNameError: no such metric of layers.
        """
        tower = next(iter(self.towers), "") if tower is None else tower
        if metric not in self.layer_metrics:
            raise UnknownNameError("metric of layers", metric, self.layer_metrics)
        found = torch.full((1 + max(r.layer for r in self.rows if r.tower == tower),), float("nan"))
        for row in self.rows:
            if (row.tower, row.metric, row.head) == (tower, metric, None):
                found[row.layer] = row.value
        return found

    def select(
        self, metric: str, *, top: float | int, tower: str | None = None, lowest: bool = False
    ) -> list[tuple[int, int]]:
        """The (layer, head) with the highest (or lowest) values: a number of heads, or a fraction
        of them (at least one head); ties go to the earlier head.

        Raises:
            ArgumentError: neither a fraction in (0, 1] nor a number from 1 on.
        """
        values = self.map(metric, tower)
        count = int(top) if isinstance(top, int) else max(1, round(top * values.numel()))
        if not top > 0 or count > values.numel():
            raise ArgumentError("top", f"a fraction in (0, 1] or 1 to {values.numel()}", top)
        worst = float("inf") if lowest else float("-inf")
        order = values.nan_to_num(worst).flatten().argsort(descending=not lowest, stable=True)
        width = values.shape[1]
        return [divmod(int(i), width) for i in order[:count]]

    def compare(self, other: Atlas) -> list[dict[str, Any]]:
        """Both values and their difference (other - self) of every head and metric in both.

        Raises:
            ArgumentError: nothing in common.
        """
        theirs = {(r.tower, r.layer, r.head, r.metric): r.value for r in other.rows}
        keys = ((r, (r.tower, r.layer, r.head, r.metric)) for r in self.rows)
        rows = [
            {**asdict(r), "other": theirs[key], "difference": theirs[key] - r.value}
            for r, key in keys
            if key in theirs
        ]
        if not rows:
            raise ArgumentError("other", "an atlas with heads and metrics in common", other.model)
        return rows

    def save(self, folder: str | Path) -> None:
        """Write atlas.json and profiles.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "schema_version": VERSION,
            "model": self.model,
            "about": dict(self.about),
            "notes": dict(self.notes),
            "meanings": dict(self.meanings),
            "rows": self.table(),
            "examples": [asdict(example) for example in self.examples],
        }
        save_file({k: v.contiguous() for k, v in self.profiles.items()}, folder / "profiles.part")
        (folder / "profiles.part").replace(folder / "profiles.safetensors")
        draft = folder / "atlas.json.part"
        draft.write_text(json.dumps(record), encoding="utf-8")
        draft.replace(folder / "atlas.json")

    @classmethod
    def load(cls, folder: str | Path) -> Atlas:
        """An atlas that was saved.

        Raises:
            ArgumentError: no atlas, or one of another version.
        """
        folder = Path(folder)
        if not (folder / "atlas.json").is_file():
            raise ArgumentError("atlas", "a folder with atlas.json", folder)
        record = json.loads((folder / "atlas.json").read_text(encoding="utf-8"))
        if record.get("schema_version") != VERSION:
            raise ArgumentError("schema_version", str(VERSION), record.get("schema_version"))
        rows = tuple(Row(**row) for row in record["rows"])
        return cls(
            record["model"],
            rows,
            load_file(folder / "profiles.safetensors"),
            record["notes"],
            record["meanings"],
            tuple(example_from(x) for x in record["examples"]),
            record["about"],
        )

    def _repr_html_(self) -> str:
        """A table of heads, one column per metric."""
        cells: dict[tuple[str, int, int], dict[str, float]] = {}
        for row in self.rows:
            if row.head is not None:
                cells.setdefault((row.tower, row.layer, row.head), {})[row.metric] = row.value
        names = "".join(f"<th>{escape(name)}</th>" for name in self.metrics)
        lines = [
            f"<tr><td>{escape(tower)}</td><td>{layer}</td><td>{head}</td>"
            + "".join(f"<td>{values.get(name, float('nan')):.3f}</td>" for name in self.metrics)
            + "</tr>"
            for (tower, layer, head), values in cells.items()
        ]
        header = f"<tr><th>tower</th><th>layer</th><th>head</th>{names}</tr>"
        return f"<table>{header}{''.join(lines)}</table>"
