"""What heads give, before the output projection: noted, averaged over tokens, put in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.core.moment import Moment
from regard.core.treatment import Treatment


@dataclass(frozen=True, eq=False)
class Averaged(Treatment):
    """Changes nothing; adds up what the heads of each module give, (H,E), and how many tokens."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def output(self, output: Tensor, at: Moment) -> Tensor:
        real = at.query_real[:, None, :, None]
        total = output.detach().double().masked_fill(~real, 0.0).sum((0, 2))
        self.sums[at.site.name] = self.sums.get(at.site.name, 0.0) + total
        self.counts[at.site.name] = self.counts.get(at.site.name, 0) + real.sum()
        return output

    def means(self) -> dict[str, Tensor]:
        """Mean output (H,E), in double precision, of every module's heads over real tokens."""
        return {name: x / self.counts[name].clamp_min(1) for name, x in self.sums.items()}


@dataclass(frozen=True, eq=False)
class Noted(Treatment):
    """Changes nothing; keeps what the heads of each module give at the tokens `where` (B,N) is
    True: (K,H,E) for K tokens in all.
    """

    where: Tensor
    found: dict[str, Tensor] = field(default_factory=dict)

    def output(self, output: Tensor, at: Moment) -> Tensor:
        self.found[at.site.name] = rows_of(output, self.where)
        return output


@dataclass(frozen=True, eq=False)
class Replaced(Treatment):
    """Heads give these values instead, by module: (K,H,E) at the tokens `where` (B,N) is True, or
    (H,E) at all of them.
    """

    values: Mapping[str, Tensor]
    where: Tensor | None = None

    def output(self, output: Tensor, at: Moment) -> Tensor:
        values = self.values[at.site.name][..., list(at.heads), :].to(output)
        if self.where is None:
            return values[:, None].expand_as(output)
        return with_rows(output, self.where, values)


def rows_of(x: Tensor, where: Tensor) -> Tensor:
    """The tokens `where` (B,N) of x (B,H,N,E): (K,H,E)."""
    return x.transpose(1, 2)[_fitting(x, where)].detach()


def with_rows(x: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """x (B,H,N,E) with values (K,H,E) at the tokens `where` (B,N)."""
    found = x.transpose(1, 2).clone()
    found[_fitting(x, where)] = values
    return found.transpose(1, 2)


def _fitting(x: Tensor, where: Tensor) -> Tensor:
    """`where`, if it speaks of the tokens of x (B,H,N,E).

    Raises:
        ArgumentError: it does not.
    """
    if where.shape != (x.shape[0], x.shape[2]):
        raise ArgumentError("where", f"tokens {(x.shape[0], x.shape[2])}", tuple(where.shape))
    return where.to(x.device)


def without(values: Tensor, others: Tensor, head: int) -> Tensor:
    """Values (K,H,E) with those of one head taken from others (K,H,E).

    Raises:
        ArgumentError: not of the same shape.
    """
    if values.shape != others.shape:
        raise ArgumentError("contrast", f"{tuple(values.shape)}", tuple(others.shape))
    found = values.clone()
    found[:, head] = others[:, head]
    return found


def stacked(values: list[Tensor]) -> Tensor:
    """Numbers (B,) of one head after the other as (B,H)."""
    return torch.stack(values, -1)
