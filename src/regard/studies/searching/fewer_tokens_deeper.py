r"""Fewer tokens deeper: a model answers from fewer tokens if each layer keeps a share of its own.

    budget = mean_l share(l)        share: part of the prompt's keys that SnapKV keeps in layer l

The falling shares that bisection finds are set beside the same budget in all layers, and beside the
same shares upside down; then a sigmoid curve of that budget is tuned. Differs from the paper: it
drops the image tokens of a vision-language model on their way up, here a cache lets go of text
tokens, so that what a layer drops a deeper one still has, and a bound on later layers is a choice;
tokens are ranked by each key head for itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from regard.core.card import Claim
from regard.core.errors import ArgumentError
from regard.core.study import Curve, Figure, Outcome, Progress, StudyCard
from regard.searchers.sigmoid_schedule import tuned_schedule
from regard.searchers.token_schedule import CARD as SEARCHER
from regard.searchers.token_schedule import Score, Shares, greedy_schedule, scored
from regard.studies.searching.needles import pocket, questions

OPTIONS = {"window": 4, "kernel": 1}
"""The question ranks the keys, and none is kept for its neighbour's sake."""

LITTLE = 1e-6
"""Nats: no loss is divided by less."""


@dataclass(frozen=True)
class FewerTokensDeeper:
    """tolerance: nats that answers may lose; levels: shares are multiples of 1 / levels; trials:
    curves that are tried; length: tokens of a needle's question; questions: how many are searched
    on, and how many are asked.
    """

    tolerance: float = 0.1
    levels: int = 32
    trials: int = 24
    length: int = 192
    questions: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise ArgumentError("levels", "at least 2", self.levels)

    def run(self, progress: Progress) -> Outcome:
        """Find both schedules, then ask other questions under them.

        Raises:
            UnsupportedError: optuna is missing.
        """
        model = pocket()
        shown = questions(self.length, self.questions, "valid", self.seed)
        exam = questions(self.length, self.questions, "test", self.seed)
        layers = model.config.num_hidden_layers
        most = layers * math.ceil(math.log2(self.levels)) + 1 + self.trials
        asked = 0

        def score(shares: Shares) -> float:
            nonlocal asked
            progress(min(asked / (most + 5), 1.0))
            asked += 1
            return on_shown(shares)

        on_shown = scored(model, shown, "snapkv", dict(OPTIONS))
        found = greedy_schedule(score, layers, tolerance=self.tolerance, levels=self.levels)
        budget = sum(found.shares) / layers
        curve = tuned_schedule(score, layers, budget, trials=self.trials, seed=self.seed)
        outcome = judge(
            scored(model, exam, "snapkv", dict(OPTIONS)), found.shares, curve.shares, budget
        )
        progress(1.0)
        return outcome


def judge(score: Score, found: Shares, curve: Shares, budget: float) -> Outcome:
    """What two schedules of one budget lose, beside that budget in all layers."""
    layers, half = len(found), len(found) // 2
    untouched = score((1.0,) * layers)
    own, tuned, flat, turned = (
        untouched - score(shares) for shares in (found, curve, (budget,) * layers, found[::-1])
    )
    deep = sum(found[-half:]) / sum(found[:half])
    even, falls = "less is lost than with the same share in all layers", "shares fall with depth"
    figures = (
        Figure("share of all tokens", budget, "fewer tokens, no worse answers", high=0.9),
        Figure("loss, of that with even shares", own / max(flat, LITTLE), even, high=0.5),
        Figure("tokens, deep half of shallow", deep, falls, high=0.75),
        Figure("loss, of that upside down", own / max(turned, LITTLE), falls, high=0.5),
        Figure("loss, curve, of even shares", tuned / max(flat, LITTLE), even, high=0.9),
    )
    lines = {
        name: [(float(layer), share) for layer, share in enumerate(shares)]
        for name, shares in {"bisection": found, "curve": curve}.items()
    }
    return Outcome(figures, (Curve("Tokens kept", "layer", "share", lines),))


CARD = StudyCard(
    name="fewer_tokens_deeper",
    build=FewerTokensDeeper,
    papers=SEARCHER.papers,
    claim=Claim(
        "with a share of its own for each layer a model answers from fewer tokens than with one",
        "regard study fewer_tokens_deeper",
    ),
    seconds=8,
    small={"levels": 4, "trials": 3, "length": 64, "questions": 2},
)
