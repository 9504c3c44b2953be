r"""Dropping by similarity: a model loses least without the sub-layers that turn its stream least.

    S = mean_t cos(x_t, y_t)        x: the stream before a sub-layer, y: after it

The plan that leaves out the most similar sub-layers is set beside every other plan that leaves out
as many. Differs from the paper: a pocket model has few layers and needs most, so that two of its
eight sub-layers go, not half of the attention of a deep one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from regard.core.card import Claim
from regard.core.errors import ArgumentError
from regard.core.study import Curve, Figure, Outcome, Progress, StudyCard
from regard.plan import Plan
from regard.recipes.layer_similarity import drop_plan
from regard.searchers.layer_dropping import CARD as SEARCHER
from regard.searchers.layer_dropping import layer_dropping
from regard.studies.searching.needles import pocket, questions, scores


@dataclass(frozen=True)
class DroppingBySimilarity:
    """count: sub-layers left out, in one shot and one after the other; length: tokens of a needle's
    question; questions: how many are measured on, and how many are asked.
    """

    count: int = 2
    length: int = 192
    questions: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 3:
            raise ArgumentError("count", "1 to 3", self.count)

    def run(self, progress: Progress) -> Outcome:
        """Try every plan of as many sub-layers."""
        model = pocket()
        shown = questions(self.length, self.questions, "valid", self.seed)
        exam = questions(self.length, self.questions, "test", self.seed)
        layers = model.config.num_hidden_layers
        parts = list(itertools.product(("attention", "mlp"), range(layers)))
        every = list(itertools.combinations(parts, self.count))
        found = [
            layer_dropping(model, shown, self.count, kind="joint", in_turn=in_turn)
            for in_turn in (False, True)
        ]
        plans = [*found, *(drop_plan(some) for some in every), Plan()]
        lost = []
        for index, plan in enumerate(plans):
            progress(index / len(plans))
            lost += scores(model, exam, [plan], "loss")
        progress(1.0)
        rises = lost[-1] - np.array(lost[:-1])  # scores are losses below zero
        return self.outcome(rises[:2], rises[2:])

    def outcome(self, own: np.ndarray, others: np.ndarray) -> Outcome:
        """Of the rises under the plans found, and under all."""
        rank = float((others < own[0] - 1e-9).mean())
        mean, little = others.mean(), "little (Llama-2-13B without 31 sub-layers: 90 % of its MMLU)"
        figures = (
            Figure("rise, one shot, of the mean of all", float(own[0] / mean), little, high=0.5),
            Figure("rise, in turn, of the mean of all", float(own[1] / mean), little, high=0.5),
            Figure("share of plans that lose less", rank, "fewer than at random", high=0.5),
        )
        ordered = [(float(i), float(x)) for i, x in enumerate(np.sort(others))]
        lines = {"all plans": ordered, "by similarity": [(0.0, own[0]), (ordered[-1][0], own[0])]}
        return Outcome(figures, (Curve("Rise of the loss", "plan, by its rise", "nats", lines),))


CARD = StudyCard(
    name="dropping_by_similarity",
    build=DroppingBySimilarity,
    papers=SEARCHER.papers,
    claim=Claim(
        "without the sub-layers that turn the stream least a model loses less than without others",
        "regard study dropping_by_similarity",
    ),
    seconds=5,
    small={"count": 1, "length": 64, "questions": 2},
)
