r"""From a budget to a plan: what each rule costs each group of heads alone, and the exact choice.

    rise[g, c] = loss(only group g follows rule c) - loss(untouched)        at least 0

Rules come from the cheapest to the dearest, each keeping what the one before keeps and more; once a
group's rise is negligible, its dearer rules are not measured: their rise is taken as zero. A rule
is never taken to be better than a dearer one, whose rise with few examples may come out larger.
Rises are taken as additive, which they are not where two groups stand in for each other; a plan's
own loss has to be measured beside the prediction.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regard.core.errors import ArgumentError
from regard.core.hosting import host_of
from regard.core.moment import Site
from regard.core.passage import Passage, passage_of
from regard.plan import Plan
from regard.plan.resolved import default_sites, signature
from regard.searchers.answering import mean_loss
from regard.searchers.prices import Prices
from regard.searchers.rules import Group, Rule, groups_of, plan_of
from regard.searchers.series import Ahead, Series, Told
from regard.searchers.solver import Numbers, solve

NEGLIGIBLE = 0.003
"""Nats per answer: a smaller rise of the loss is none."""


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What was measured: rises (G,C) of the loss of every group under every rule alone, and the
    loss of the untouched model.
    """

    groups: tuple[Group, ...]
    rules: tuple[Rule, ...]
    rises: Numbers
    untouched: float


@dataclass(frozen=True, eq=False)
class Fitted:
    """A plan for a budget: the rule (G,) of every group, the rise of the loss that the rises alone
    predict, its cost as a part of the untouched model's, the dearest over all lengths, and the
    plan's own rise where it was measured.
    """

    plan: Plan
    choice: NDArray[np.int64]
    predicted: float
    cost: float
    measured: float | None = None


def decoder_sites(model: Any) -> tuple[Site, ...]:
    """The layers of causal self-attention of a model's main tower.

    Raises:
        ArgumentError: there are none.
    """
    sites = tuple(s for s in default_sites(host_of(model).sites(model)) if s.causal)
    if not sites:
        raise ArgumentError("model", "a decoder", type(model).__name__)
    return sites


def sensitivity(
    model: Any,
    passages: Sequence[Passage],
    rules: Sequence[Rule],
    *,
    known: MutableMapping[str, float] | None = None,
    ahead: Ahead | None = None,
    progress: Told | None = None,
) -> Sensitivity:
    """Measure every rule on every group alone. known: losses by key, looked up before a measurement
    and added to after it, so that an interrupted search goes on. ahead: measures them elsewhere.

    Raises:
        ArgumentError: no passage; a model that is no decoder.
        UnsupportedError: a passage without an answer, a model without a cache.
    """
    given = [passage_of(p) for p in passages]
    if not given:
        raise ArgumentError("passages", "at least one", 0)
    groups = groups_of(decoder_sites(model))
    known = {} if known is None else known
    untouched = remembered(known, "untouched", lambda: mean_loss(model, given))
    rises = np.zeros((len(groups), len(rules)))
    wanted = [_alone(group, rules, untouched + NEGLIGIBLE) for group in groups]
    if ahead is not None:
        ahead(wanted, progress)
    for g, series in enumerate(wanted):
        for c, (key, plan) in enumerate(zip(series.keys, series.plans, strict=True)):
            if progress is not None:
                progress((g + c / len(rules)) / len(groups), key)
            loss = remembered(known, key, lambda plan=plan: mean_loss(model, given, plan))
            rises[g, c] = loss - untouched
            if rises[g, c] <= NEGLIGIBLE:
                rises[g, c] = 0.0
                break
    if progress is not None:
        progress(1.0, "")
    falling = np.maximum.accumulate(rises[:, ::-1], axis=1)[:, ::-1]
    return Sensitivity(groups, tuple(rules), falling, untouched)


def _alone(group: Group, rules: Sequence[Rule], enough: float) -> Series:
    """The plans in which one group alone follows a rule."""
    acting = [(c, r) for c, r in enumerate(rules) if r.treatment is not None]
    return Series(
        tuple(f"{group.layer}.{group.kv_head} {rule.label}" for _, rule in acting),
        tuple(plan_of([group], rules, np.array([c]), name="") for c, _ in acting),
        enough,
    )


def remembered(known: MutableMapping[str, float], key: str, measure: Callable[[], float]) -> float:
    """What is known under a key, measured and noted where nothing is."""
    if key not in known:
        known[key] = measure()
    return known[key]


def fitted(model: Any, found: Sensitivity, prices: Prices, budget: float) -> Fitted:
    """The plan with the smallest predicted rise within a budget, a part of the untouched model's
    cost. What the exact choice leaves of the budget goes to the groups that gain most tokens.

    Raises:
        ArgumentError: a budget that cannot be met, with the smallest that can.
    """
    room = prices.room(budget)
    choice = spent(solve(found.rises, prices.costs, room), found.rises, prices.costs, room)
    return chosen_plan(model, found, prices, choice, budget)


def chosen_plan(
    model: Any, found: Sensitivity, prices: Prices, choice: NDArray[np.int64], budget: float
) -> Fitted:
    """A choice (G,) as a plan."""
    plan = plan_of(
        found.groups, found.rules, choice, name=f"fitted to {budget:g}", made_for=signature(model)
    )
    predicted = float(found.rises[np.arange(len(choice)), choice].sum())
    return Fitted(plan, choice, predicted, float(prices.total(choice).max()))


def spent(
    choice: NDArray[np.int64], rises: Numbers, costs: Numbers, room: Numbers
) -> NDArray[np.int64]:
    """The choice with what is left of the budget spent on steps up that raise no loss, the group
    with most at stake first, since examples are few and a needle may lie where none did.
    """
    choice = choice.copy()
    while True:
        steps = []
        spent = costs[:, np.arange(len(choice)), choice].sum(1)
        for g, c in enumerate(choice.tolist()):
            dearer = (costs[:, g] > costs[:, g, c, None]).all(0) & (rises[g] <= rises[g, c])
            fits = (spent[:, None] + costs[:, g] - costs[:, g, c, None] <= room[:, None]).all(0)
            options = (dearer & fits).nonzero()[0]
            if len(options):
                next_up = options[costs[0, g, options].argmin()]
                steps.append((-rises[g].max(), costs[0, g, next_up], g, next_up))
        if not steps:
            return choice
        _, _, g, up = min(steps)
        choice[g] = up
