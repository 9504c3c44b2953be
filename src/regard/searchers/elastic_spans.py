r"""Elastic spans: for every head a window that grows with the prompt, found at several lengths.

    1  effects |E| of the loss by pairs of query and key, at every profiled length
    2  loss[p, g, rule] = what the rule hides of them at length p
    3  the Pareto front of sum_g loss[p, g, x_g] over the lengths p, under a bound on the mean
       density at every length, most of which is to be used, since at lengths that are not profiled
       no loss asks for it: an exact integer programme, one per point of an epsilon grid
    4  of the plans on the front, the one with the lowest measured loss at lengths not profiled

Density is tokens kept by tokens read. Layers use at most `distinct` rules, so that their heads can
be gathered. Key heads, not query heads, get rules: heads that share keys add their effects. What
counts in a loss is the answers, in the paper the model's own (`regard.searchers.own_answers`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.passage import Passage
from regard.core.searcher import SearcherCard
from regard.plan import Plan
from regard.plan.resolved import signature
from regard.searchers.elastic_rules import elastic_rules, span_effects, span_losses
from regard.searchers.fitting import decoder_sites
from regard.searchers.judging import judged, whole
from regard.searchers.pareto import Choice, pareto
from regard.searchers.prices import kept
from regard.searchers.rules import Group, groups_of, plan_of
from regard.searchers.solver import Numbers

Told = Callable[[float, str], None]


@dataclass(frozen=True, eq=False)
class Spans:
    """What was found. front: plans that no other beats at all lengths; predicted (F,P): their
    losses by the effects; measured (F,): their losses on what was not profiled; densities (F,Q):
    at the profiled `lengths` and those that were added.
    """

    plan: Plan
    front: tuple[Plan, ...]
    predicted: Numbers
    measured: tuple[float, ...]
    densities: Numbers
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class ElasticSpans:
    """density: bound at every length; used: part of it that a plan must use at every length.
    lengths: more lengths at which both hold. block, sinks, step, slopes: of the rules. points: of
    the grid, per length. distinct: rules in a layer; 0: any number, 1: one window per layer.
    """

    density: float = 0.5
    used: float = 0.9
    lengths: tuple[int, ...] = ()
    block: int = 64
    sinks: int = 1
    step: int | None = None
    slopes: int = 9
    points: int = 5
    distinct: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1 or not 0 <= self.used <= 1:
            raise ArgumentError("density, used", "fractions in (0, 1], [0, 1]", self)
        if self.points < 2 or self.distinct < 0:
            raise ArgumentError("points, distinct", "points >= 2 and distinct >= 0", self)

    def run(
        self,
        model: Any,
        passages: Sequence[Passage],
        unseen: Sequence[Passage],
        progress: Told | None = None,
    ) -> Spans:
        """Search on passages of one or several lengths, and choose on `unseen` ones.

        Raises:
            ArgumentError: nothing to profile or to choose by, a density that cannot be met, or not
                used so far.
            UnsupportedError: padded passages, or passages without anything to predict.
        """
        given, chosen_on = by_length(passages), by_length(unseen)
        if not given or not chosen_on:
            raise ArgumentError("passages, unseen", "one or more of both", "none")
        sites = decoder_sites(model)
        groups = groups_of(sites)
        lengths = tuple(sorted({*given, *chosen_on, *self.lengths}))
        options: dict[str, Any] = {"block": self.block, "sinks": self.sinks}
        rules = elastic_rules(list(given), **options, step=self.step, slopes=self.slopes)
        told = progress or (lambda part, what: None)
        losses = []
        for done, (length, mine) in enumerate(given.items()):
            told(done / (len(given) + 1), f"effects at {length} tokens")
            effects = span_effects(model, sites, mine, self.block)
            losses.append(span_losses(effects, rules, length, self.block))
        predicted = np.stack(losses)
        costs = kept(groups, rules, lengths) / (np.array(lengths) * len(groups))[:, None, None]
        choices = self._choices(groups, predicted, costs)
        name, kind = f"elastic spans of {self.density:g}", signature(model)
        plans = tuple(plan_of(groups, rules, c, name=name, made_for=kind) for c in choices)
        told(len(given) / (len(given) + 1), f"{len(plans)} plans at unseen lengths")
        measured = tuple(_loss(model, unseen, plan) for plan in plans)
        told(1.0, "chosen")
        rows = np.arange(len(groups))
        return Spans(
            plans[int(np.argmin(measured))],
            plans,
            np.array([predicted[:, rows, c].sum(1) for c in choices]),
            measured,
            np.array([costs[:, rows, c].sum(1) for c in choices]),
            lengths,
        )

    def _choices(self, groups: Sequence[Group], losses: Numbers, costs: Numbers) -> list[Choice]:
        """The Pareto front of losses (P,G,C) within the bounds on the costs (Q,G,C)."""
        bounds = np.full(len(costs), self.density)
        return pareto(
            losses,
            costs,
            bounds,
            blocks=np.array([group.layer for group in groups]),
            distinct=self.distinct,
            points=self.points,
            floors=self.used * bounds,
        )


def by_length(passages: Sequence[Passage]) -> dict[int, list[Passage]]:
    """Passages by the tokens of one forward, answers included, the shortest first.

    Raises:
        ArgumentError: passages without tokens.
    """
    found: dict[int, list[Passage]] = {}
    for passage in map(whole, passages):
        if passage.tokens is None:
            raise ArgumentError("passages", "their tokens", None)
        found.setdefault(passage.tokens.shape[1], []).append(passage)
    return dict(sorted(found.items()))


def _loss(model: Any, passages: Sequence[Passage], plan: Plan) -> float:
    with plan.applied(model):
        return -judged(model, passages, "loss")


CARD = SearcherCard(
    name="elastic_spans",
    build=ElasticSpans,
    finds="plan",
    papers=(
        Paper(
            "2406.14909",
            "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
            2024,
        ),
    ),
    claim=Claim(
        "windows fitted to each head keep what one window of the same density for all loses",
        "regard study windows_by_head",
    ),
)
