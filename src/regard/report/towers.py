"""The numbers of an atlas as matrices of layers and heads, one tower of attention after another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from regard.atlases.record import Atlas, Row

Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Tower:
    """One tower. values, counts: metric -> (layers, heads), NaN and 0 where nothing was measured.
    of_layers: metric -> (layers,). alone: the atlas has no other tower.
    """

    name: str
    alone: bool
    layers: int
    heads: int
    values: Mapping[str, Numbers]
    counts: Mapping[str, NDArray[np.int64]]
    of_layers: Mapping[str, Numbers]

    @property
    def plain(self) -> list[str]:
        """Metrics over all passages, not those of one domain."""
        return [name for name in self.values if "@" not in name]

    @property
    def there(self) -> NDArray[np.bool_]:
        """Which (layers, heads) have any number; layers may differ in their heads."""
        found = np.zeros((self.layers, self.heads), dtype=bool)
        for counts in self.counts.values():
            found |= counts >= 0
        return found

    def anchor(self, layer: int, head: int) -> str:
        """Where the page of a head is found: "L3.H5", after the name of one of several towers."""
        place = f"L{layer}.H{head}"
        return place if self.alone else f"{quote(self.name, safe='')}.{place}"

    def strongest(self, metric: str, count: int) -> list[tuple[int, int]]:
        """The heads with the highest values that were measured, earlier ones first among equals."""
        return ordered(self.values[metric], count)


def ordered(values: Numbers, count: int) -> list[tuple[int, int]]:
    """Places of the `count` highest numbers of a matrix, NaN left out."""
    flat = values.ravel()
    order = np.argsort(-np.where(np.isnan(flat), -np.inf, flat), kind="stable")
    kept = [int(i) for i in order[:count] if not np.isnan(flat[i])]
    return [divmod(i, values.shape[1]) for i in kept]


def towers(atlas: Atlas) -> list[Tower]:
    """The towers of an atlas in their order."""
    grouped: dict[str, list[Row]] = {}
    for row in atlas.rows:
        grouped.setdefault(row.tower, []).append(row)
    return [_tower(name, rows, len(grouped) == 1) for name, rows in grouped.items()]


def _tower(name: str, rows: Sequence[Row], alone: bool) -> Tower:
    layers = 1 + max(row.layer for row in rows)
    heads = 1 + max((row.head for row in rows if row.head is not None), default=-1)
    values: dict[str, Numbers] = {}
    counts: dict[str, NDArray[np.int64]] = {}
    of_layers: dict[str, Numbers] = {}
    for row in rows:
        if row.head is None:
            found = of_layers.setdefault(row.metric, np.full(layers, np.nan))
            found[row.layer] = row.value
        else:
            if row.metric not in values:
                values[row.metric] = np.full((layers, heads), np.nan)
                counts[row.metric] = np.full((layers, heads), -1, dtype=np.int64)
            values[row.metric][row.layer, row.head] = row.value
            counts[row.metric][row.layer, row.head] = row.n
    return Tower(name, alone, layers, heads, values, counts, of_layers)


def domains(names: Iterable[str]) -> list[str]:
    """The kinds of data that metrics `name@domain` speak of."""
    return list(dict.fromkeys(n.partition("@")[2] for n in names if "@" in n))
