r"""Refining a plan in company: rises measured around the plan itself instead of one head at a time.

    rise'[g, c] = loss(plan, but group g follows rule c) - loss(plan)

Heads that stand in for each other look needless alone. Around a plan they do not: the choice is
solved again with these rises, over rules near the present ones, as long as the measured loss falls.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regard.core.passage import Passage
from regard.searchers.answering import mean_loss
from regard.searchers.fitting import Fitted, Sensitivity, chosen_plan, remembered, spent
from regard.searchers.prices import Prices
from regard.searchers.rules import plan_of
from regard.searchers.series import Ahead, Series, Told
from regard.searchers.solver import Numbers, solve

NEAR = 2
"""Rules on both sides of the present one that a round may move to, besides the dearest."""
EXCLUDED = 1e6
"""Nats: what a rule out of reach seems to cost."""
Choice = NDArray[np.int64]


class Company:
    """Plans by their choices on one model and passages. known, ahead: see `sensitivity`."""

    def __init__(
        self,
        model: Any,
        passages: Sequence[Passage],
        found: Sensitivity,
        known: MutableMapping[str, float],
        ahead: Ahead | None = None,
    ) -> None:
        self.model, self.passages, self.found, self.known = model, passages, found, known
        self.ahead = ahead

    def loss(self, choice: Choice) -> float:
        """Mean loss of the answers under a choice (G,)."""
        (key,), (plan,) = (one := self._series(choice)).keys, one.plans
        return remembered(self.known, key, lambda: mean_loss(self.model, self.passages, plan))

    def _series(self, choice: Choice) -> Series:
        rules = [self.found.rules[c].label for c in choice.tolist()]
        plan = plan_of(self.found.groups, self.found.rules, choice, name="")
        return Series((" | ".join(rules),), (plan,))

    def rises(self, choice: Choice, told: Told | None) -> Numbers:
        """Rises (G,C) around a choice; rules out of reach cost EXCLUDED. Groups that lose nothing
        alone under any rule are not measured again: they may go to any rule.
        """
        rises = np.full(self.found.rises.shape, EXCLUDED)
        here, at_stake = self.loss(choice), (self.found.rises != 0).any(axis=1)
        rises[~at_stake] = 0.0
        others = {int(g): self._others(choice, int(g)) for g in np.flatnonzero(at_stake)}
        if self.ahead is not None:
            self.ahead([self._series(x) for some in others.values() for x in some], told)
        for g, some in others.items():
            if told is not None:
                told(g / len(choice), f"key head {g} in company")
            for other in some:
                rises[g, other[g]] = self.loss(other) - here
        return rises

    def _others(self, choice: Choice, g: int) -> list[Choice]:
        """The choice with each rule in reach for one group."""
        now, last = int(choice[g]), len(self.found.rules) - 1
        near = {*range(max(0, now - NEAR), min(last, now + NEAR) + 1), last}
        return [np.where(np.arange(len(choice)) == g, c, choice) for c in sorted(near)]


def concentrated(found: Sensitivity, prices: Prices, budget: float) -> Choice:
    """The choice in which the groups with most at stake get the dearest rule that still fits, one
    after the other, and the others the cheapest: a start for heads that stand in for each other.
    """
    room, costs = prices.room(budget), prices.costs
    groups = np.arange(len(found.groups))
    choice = costs.sum(0).argmin(1)
    for g in np.argsort(-found.rises.max(1), kind="stable"):
        spare = room - costs[:, groups, choice].sum(1) + costs[:, g, choice[g]]
        fits = (costs[:, g] <= spare[:, None] * (1 + 1e-9)).all(0)
        choice[g] = np.where(fits, costs[:, g].sum(0), -1).argmax()
    return choice


def even(prices: Prices, budget: float) -> Choice:
    """The choice in which every group gets the dearest rule that an equal part of a budget pays."""
    part = prices.room(budget) / prices.costs.shape[1]
    fits = (prices.costs <= part[:, None, None] * (1 + 1e-9)).all(0)
    total = prices.costs.sum(0)
    return np.where(fits.any(1), np.where(fits, total, -1).argmax(1), total.argmin(1))


def refined(
    company: Company,
    start: Fitted,
    prices: Prices,
    budget: float,
    *,
    rounds: int = 3,
    also: Sequence[Choice] = (),
    progress: Told | None = None,
) -> Fitted:
    """The best measured plan within a budget after some rounds from the best of `start`, of the
    concentrated choice, of the even one and of others that fit; so that a larger budget, given the
    choices of smaller ones, is never worse.
    """
    room = prices.room(budget)
    starts = [start.choice, concentrated(company.found, prices, budget), *also]
    level = even(prices, budget)
    if (prices.total(level) <= budget * (1 + 1e-9)).all():
        starts.append(level)
    best = min(starts, key=company.loss)
    for _ in range(rounds):
        rises = company.rises(best, progress)
        choice = spent(solve(rises, prices.costs, room), company.found.rises, prices.costs, room)
        if company.loss(choice) >= company.loss(best):
            break
        best = choice
    found = chosen_plan(company.model, company.found, prices, best, budget)
    return replace(found, measured=company.loss(best) - company.found.untouched)
