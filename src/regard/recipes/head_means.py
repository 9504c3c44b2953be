"""Head means: what each head gives on average over texts, as a file for `mean_ablation`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.core.moment import Moment
from regard.core.treatment import Treatment
from regard.recipes.watching import watched


@dataclass(frozen=True)
class Watch(Treatment):
    """Changes nothing; adds up what the heads of each module give, (H,E), and how many tokens."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def output(self, output: Tensor, at: Moment) -> Tensor:
        real = at.query_real[:, None, :, None]
        total = output.detach().double().masked_fill(~real, 0.0).sum((0, 2))
        self.sums[at.site.name] = self.sums.get(at.site.name, 0.0) + total
        self.counts[at.site.name] = self.counts.get(at.site.name, 0) + real.sum()
        return output


@torch.no_grad()
def head_means(model: Any, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Mean output (H,E), in float32, of every self-attention module's heads over the real tokens of
    batches, each the keyword arguments of one forward.

    Raises:
        ArgumentError: there is no batch.
    """
    watch = Watch()
    with watched(model, watch):
        for batch in batches:
            model(**batch)
    if not watch.sums:
        raise ArgumentError("batches", "one batch or more", 0)
    return {n: (x / watch.counts[n].clamp_min(1)).float().cpu() for n, x in watch.sums.items()}


def save_head_means(model: Any, batches: Iterable[Mapping[str, Any]], path: str | Path) -> Path:
    """Write `head_means` as safetensors."""
    path = Path(path)
    save_file({n: x.contiguous() for n, x in head_means(model, batches).items()}, path)
    return path
