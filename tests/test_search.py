"""Search: the solver against exhaustive search, budgets, and what a fitted plan keeps."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.core.errors import ArgumentError
from regard.searchers.prices import Prices
from regard.searchers.rules import Group, Rule, ladder, plan_of
from regard.searchers.solver import Numbers, front, solve


def exhaustive(losses: Numbers, costs: Numbers, budgets: Numbers) -> float:
    """The smallest loss of any choice within the budgets."""
    groups, choices = losses.shape
    best = np.inf
    for choice in product(range(choices), repeat=groups):
        at = np.arange(groups), list(choice)
        if bool((costs[:, at[0], at[1]].sum(1) <= budgets * (1 + 1e-9)).all()):
            best = min(best, float(losses[at].sum()))
    return best


def drawn(seed: int, groups: int = 4, choices: int = 3, lengths: int = 2) -> tuple[Numbers, ...]:
    random = np.random.default_rng(seed)
    losses = np.round(random.random((groups, choices)), 1)
    return losses, np.sort(random.random((lengths, groups, choices)), 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 1.0))
def test_the_solver_equals_exhaustive_search(seed: int, part: float) -> None:
    losses, costs = drawn(seed)
    least, most = costs.min(2).sum(1), costs.max(2).sum(1)
    budgets = least + part * (most - least)
    choice = solve(losses, costs, budgets)
    rows = np.arange(len(choice))
    assert bool((costs[:, rows, choice].sum(1) <= budgets * (1 + 1e-9)).all())
    assert losses[rows, choice].sum() == pytest.approx(exhaustive(losses, costs, budgets))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_a_larger_budget_never_predicts_a_larger_loss(seed: int) -> None:
    losses, costs = drawn(seed, groups=5, lengths=1)
    least, most = costs.min(2).sum(1), costs.max(2).sum(1)
    found = []
    for part in np.linspace(0, 1, 7):
        choice = solve(losses, costs, least + part * (most - least))
        found.append(losses[np.arange(5), choice].sum())
    assert all(b <= a + 1e-6 for a, b in pairwise(found))


def test_few_distinct_choices_in_a_block() -> None:
    random = np.random.default_rng(0)
    losses, costs = random.random((6, 4)), random.random((1, 6, 4))
    blocks = np.array([0, 0, 0, 1, 1, 1])
    free = solve(losses, costs, np.array([10.0]))
    assert len(set(free[:3].tolist())) > 1
    bound = solve(losses, costs, np.array([10.0]), blocks=blocks, distinct=1)
    assert len(set(bound[:3].tolist())) == len(set(bound[3:].tolist())) == 1
    best = min(losses[:3, c].sum() for c in range(4)) + min(losses[3:, c].sum() for c in range(4))
    assert losses[np.arange(6), bound].sum() == pytest.approx(best)


def test_ties_go_to_the_cheaper_then_the_earlier() -> None:
    losses = np.zeros((3, 3))
    costs = np.array([[[2.0, 1, 1], [1, 2, 3], [1, 1, 1]]])
    assert solve(losses, costs, np.array([9.0])).tolist() == [1, 0, 0]


def test_a_budget_that_cannot_be_met_says_which_can() -> None:
    losses, costs = drawn(1, lengths=1)
    least = costs.min(2).sum()
    with pytest.raises(ArgumentError, match=f"at least {least:.6g}"):
        solve(losses, costs, np.array([least * 0.9]))
    with pytest.raises(ArgumentError, match="finite"):
        solve(losses * np.nan, costs, np.array([9.0]))


def test_a_budget_that_no_rule_saves_for_says_so() -> None:
    """As where every rule takes as long as the untouched model."""
    same = Prices(np.zeros((1, 2, 3)), np.ones(1))
    assert same.room(1.0) == pytest.approx([0.0])
    with pytest.raises(ArgumentError, match=r"expected 1: no rule costs less, got 0\.9"):
        same.room(0.9)


def test_the_front_holds_what_nothing_beats() -> None:
    points = np.array([[1.0, 5.0], [2.0, 2.0], [2.0, 3.0], [5.0, 1.0], [2.0, 2.0]])
    assert front(points) == [0, 1, 3]


def test_a_plan_from_choices() -> None:
    rules = ladder("spans", (1 / 8, 1 / 2, 1.0))
    assert [rule.kept(64) for rule in rules] == [8, 32, 64]
    assert rules[0].kept(16) == 5  # four sinks and the newest token
    groups = [Group(layer, head) for layer in range(2) for head in range(2)]
    plan = plan_of(groups, rules, np.array([0, 2, 0, 1]), name="some")
    told = [(step.layers, step.kv_heads, step.options["budget"]) for step in plan.steps]
    assert told == [((0, 1), (0,), 1 / 8), ((1,), (1,), 1 / 2)]
    assert plan_of(groups, (Rule(None),), np.zeros(4, dtype=int), name="none").steps == ()
    with pytest.raises(ArgumentError):
        ladder("spans", (0.5, 0.25))
