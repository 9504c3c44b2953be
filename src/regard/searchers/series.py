"""Series of plans whose losses are wanted, so that they can be measured ahead and elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from math import inf

from regard.plan import Plan

Told = Callable[[float, str], None]


@dataclass(frozen=True)
class Series:
    """Plans by key, in order; after a loss of at most `enough` those that follow are not wanted."""

    keys: tuple[str, ...]
    plans: tuple[Plan, ...]
    enough: float = -inf

    def measure(self, known: MutableMapping[str, float], loss: Callable[[Plan], float]) -> None:
        """Add to `known` what is wanted and not in it."""
        for key, plan in zip(self.keys, self.plans, strict=True):
            if key not in known:
                known[key] = loss(plan)
            if known[key] <= self.enough:
                return

    def unknown(self, known: Mapping[str, float]) -> Series | None:
        """What is left to be measured; None if nothing is."""
        for index, key in enumerate(self.keys):
            if key not in known:
                return Series(self.keys[index:], self.plans[index:], self.enough)
            if known[key] <= self.enough:
                return None
        return None


Ahead = Callable[[Sequence[Series], Told | None], None]
"""Measures what series want, if it can, where a search will look it up."""
