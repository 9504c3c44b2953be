r"""Greedy heads: the heads to treat for an objective, found a few at a time.

    R <- all heads;  S <- {}
    in every round:  J(l, h) = objective(S + {(l, h)} treated)  for all (l, h) in R
                     S <- S + the `count` heads with the largest J,  R <- R - S

The objective is any function of a context in which the heads are treated: a loss, a score of
generated images, or a pass under treatment against one without, as guidance has it. Heads of a
round are chosen together, each judged alone beside those of the rounds before; with one head per
round every head is judged in the company it will have. Works on every model a host reaches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.mode import in_mode
from regard.core.moment import Site
from regard.core.scene import Scene
from regard.core.searcher import SearcherCard
from regard.core.treatment import Treatment
from regard.plan import Plan
from regard.searchers.head_sets import Heads, Objective, plan_of_heads, treating, units

Told = Callable[[float, str], None]


@dataclass(frozen=True, eq=False)
class GreedyHeads:
    """What was found. heads: in the order in which they were chosen; scores: the objective with
    each (or each few that share keys) beside those of earlier rounds; reached: the objective with
    the heads up to each round's end; untouched: with none.
    """

    scene: Scene
    treatment: Treatment
    heads: Heads
    scores: tuple[float, ...]
    reached: tuple[float, ...]
    untouched: float

    @property
    def plan(self) -> Plan:
        """The heads of all rounds, as a plan.

        Raises:
            UnsupportedError: a treatment that no plan can name.
        """
        return plan_of_heads(self.scene, self.treatment, self.heads, "greedy heads")


def greedy_heads(
    scene: Scene,
    treatment: Treatment,
    objective: Objective,
    count: int = 1,
    rounds: int = 1,
    *,
    sites: Sequence[Site] | None = None,
    progress: Told | None = None,
) -> GreedyHeads:
    """Choose `count` heads in each of some rounds, so that the objective is large; heads that share
    keys count as one if the treatment evicts keys. sites: whose heads may be chosen (None: all
    self-attention of the scene). Equal heads: the earlier one.

    Raises:
        ArgumentError: numbers below 1, more heads than there are, an objective that is no number.
    """
    pool = list(units(scene.own if sites is None else sites, treatment))
    if count < 1 or rounds < 1 or count * rounds > len(pool):
        got = f"{count} heads in {rounds} rounds"
        raise ArgumentError("count, rounds", f"1 to {len(pool)} heads in all", got)

    def value(heads: Heads) -> float:
        with in_mode(scene.model, False):
            found = float(objective(treating(scene, treatment, heads)))
        if math.isnan(found):
            raise ArgumentError("objective", "a number", found)
        return found

    untouched = value(())
    selected: Heads = ()
    scores: list[float] = []
    reached: list[float] = []
    for number in range(rounds):
        found = []
        for done, heads in enumerate(pool):
            if progress is not None:
                site, head = heads[0]
                progress((number + done / len(pool)) / rounds, f"{site.name} {head}")
            found.append(value((*selected, *heads)))
        best = sorted(range(len(pool)), key=lambda i: -found[i])[:count]
        selected = (*selected, *(head for i in best for head in pool[i]))
        scores += [found[i] for i in best]
        reached.append(scores[-1] if count == 1 else value(selected))
        pool = [heads for i, heads in enumerate(pool) if i not in best]
    if progress is not None:
        progress(1.0, "")
    return GreedyHeads(scene, treatment, selected, tuple(scores), tuple(reached), untouched)


CARD = SearcherCard(
    name="greedy_heads",
    build=greedy_heads,
    finds="plan",
    papers=(
        Paper(
            "2506.10978",
            "Fine-Grained Perturbation Guidance via Attention Head Selection",
            2025,
        ),
    ),
    claim=Claim(
        "two heads, found one after the other, undo retrieval as a whole layer does",
        "regard study few_heads_retrieve",
    ),
)
