"""Means over sequences of what was found at each site."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.atlases.record import Row
from regard.core.moment import Site
from regard.core.probe import Finding


class Sums:
    """Sums and counts by (tower, layer, name); NaN stands for nothing to measure."""

    def __init__(self) -> None:
        self.total: dict[tuple[str, int, str], Tensor] = {}
        self.count: dict[tuple[str, int, str], Tensor] = {}

    def add(self, site: Site, values: Mapping[str, Tensor]) -> None:
        """Take in values (B,…) by name."""
        for name, x in values.items():
            there = ~x.isnan()
            total = x.double().masked_fill(~there, 0.0).sum(0).cpu()
            self._add((site.tower, site.layer, name), total, there.sum(0).cpu())

    def merge(self, other: Sums) -> None:
        """Take in what another holds."""
        for key, total in other.total.items():
            self._add(key, total, other.count[key])

    def _add(self, key: tuple[str, int, str], total: Tensor, count: Tensor) -> None:
        self.total[key] = self.total.get(key, torch.zeros_like(total)) + total
        self.count[key] = self.count.get(key, torch.zeros_like(count)) + count

    def rows(self) -> list[Row]:
        """One row per number: of a head where values are (B,H), of a layer where they are (B,)."""
        found = []
        for (tower, layer, name), total in self.total.items():
            count = self.count[tower, layer, name]
            for index, n in enumerate(count.flatten().tolist()):
                head = index if total.ndim else None
                value = float(total.flatten()[index]) / n if n else float("nan")
                found.append(Row(tower, layer, head, name, value, n))
        return found

    def stacked(self) -> dict[str, Tensor]:
        """Means (layers, …) by "tower/name", shorter ones filled with zeros."""
        found: dict[str, list[Tensor]] = {}
        for (tower, layer, name), total in self.total.items():
            mean = (total / self.count[tower, layer, name].clamp_min(1)).float()
            found.setdefault(f"{tower}/{name}", []).append(mean)
        longest = {key: max(x.shape[-1] for x in parts) for key, parts in found.items()}
        return {
            key: torch.stack([F.pad(x, (0, longest[key] - x.shape[-1])) for x in parts])
            for key, parts in found.items()
        }


class Gathered:
    """All that is found, and, where passages are of several domains, by domain: `metric@domain`."""

    def __init__(self) -> None:
        self.metrics, self.layers, self.profiles = Sums(), Sums(), Sums()

    def add(self, site: Site, finding: Finding, domain: str = "") -> None:
        """Take in one finding."""
        for sums, values in (
            (self.metrics, finding.metrics),
            (self.layers, finding.layers),
            (self.profiles, finding.profiles),
        ):
            sums.add(site, values)
            if domain and sums is not self.profiles:
                sums.add(site, {f"{name}@{domain}": x for name, x in values.items()})

    def merge(self, other: Gathered) -> None:
        """Take in what was found elsewhere."""
        self.metrics.merge(other.metrics)
        self.layers.merge(other.layers)
        self.profiles.merge(other.profiles)
