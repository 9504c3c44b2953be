"""What an atlas says about a tower as a whole: bins of entropy, and how heads change with depth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.atlases.record import Atlas

BINS = 4


@dataclass(frozen=True)
class EntropyBins:
    """Shares of heads whose mean entropy lies in the quarters of 0 … the largest that any head of
    the tower has (arXiv 2501.03489).
    """

    shares: tuple[float, ...]

    @property
    def collapsed(self) -> float:
        """Share of heads in the lowest quarter: they look at few keys."""
        return self.shares[0]

    @property
    def overloaded(self) -> float:
        """Share of heads in the highest quarter: they look at everything."""
        return self.shares[-1]


def entropy_bins(atlas: Atlas, tower: str | None = None) -> EntropyBins:
    """Entropy collapse and overload of one tower (the first, unless it is said).

    Raises:
        UnknownNameError: entropy was not measured, or no such tower.
    """
    values = atlas.map("entropy", tower).flatten()
    values = values[~values.isnan()]
    most = values.max().clamp_min(torch.finfo(values.dtype).tiny)
    which = (values / most * BINS).long().clamp_max(BINS - 1)
    counts = torch.bincount(which, minlength=BINS)
    return EntropyBins(tuple((counts / counts.sum()).tolist()))


def by_depth(atlas: Atlas, metric: str, tower: str | None = None) -> Tensor:
    """Mean of a metric over each layer's heads and their standard deviation, (layers,2): heads that
    converge with depth have a falling second column.

    Raises:
        UnknownNameError: no such metric or tower.
    """
    values = atlas.map(metric, tower).double()
    mean = values.nanmean(-1, keepdim=True)
    spread = (values - mean).square().nanmean(-1, keepdim=True).sqrt()
    return torch.cat([mean, spread], -1)
