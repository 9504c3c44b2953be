r"""ZeroTuning: one number for the first token of the heads that profit from it.

    1  score every head under a trial gamma: up-effective if more weight on the first token helps,
       down-effective if less does
    2  take the larger of the two types
    3  gamma = argmax of the score over a grid, with those heads alone

The score is accuracy on examples with answers, or, without any, less entropy of what is predicted;
gamma may go by another than the heads do. As published a head is a number shared by all layers;
`shared=False` judges each head of each layer.
Equal scores: the gamma nearest to 1, then the smaller one; equal types: up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.scene import Scene
from regard.core.searcher import SearcherCard
from regard.plan import Plan
from regard.searchers.head_sets import (
    SAME,
    Heads,
    Objective,
    every_head,
    judging,
    plan_of_heads,
    treating,
)
from regard.searchers.judging import By
from regard.treatments.initial_token import InitialToken

GAMMAS = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)


@dataclass(frozen=True, eq=False)
class ZeroTuned:
    """What was found. up, down: heads by type; gamma: for the larger type; scores: by gamma, that
    of the untouched model by 1.
    """

    plan: Plan
    up: Heads
    down: Heads
    gamma: float
    scores: dict[float, float]

    @property
    def heads(self) -> Heads:
        """The larger type."""
        return max(self.up, self.down, key=len)

    @property
    def untouched(self) -> float:
        """The score without any."""
        return self.scores[1.0]


@dataclass(frozen=True)
class ZeroTuning:
    """gammas: the grid; 1, which leaves the model as it is, is always in it. trial: the gamma that
    heads are classified with. by: what heads are classified by; tuned_by: what gamma is chosen by
    (None: the same). shared: one choice per head number.
    """

    gammas: tuple[float, ...] = GAMMAS
    trial: float = 2.0
    by: By = "accuracy"
    tuned_by: By | None = None
    shared: bool = True

    def __post_init__(self) -> None:
        if self.trial == 1 or not self.gammas:
            raise ArgumentError("trial, gammas", "a trial other than 1, and a grid", self)
        for gamma in (self.trial, *self.gammas):
            InitialToken(gamma)

    def run(self, scene: Scene) -> ZeroTuned:
        """Classify the heads of the scene's chain of self-attention and tune gamma.

        Raises:
            ArgumentError: no passage with something to predict.
        """
        up, down = self._types(scene, judging(scene, self.by))
        heads = max(up, down, key=len)
        objective = judging(scene, self.tuned_by or self.by)
        scores = {1.0: objective(treating(scene, InitialToken(), ()))}
        for gamma in sorted(set(self.gammas) - {1.0}) if heads else ():
            scores[gamma] = objective(treating(scene, InitialToken(gamma), heads))
        gamma = min(scores, key=lambda g: (-round(scores[g] / SAME), _distance(g), g))
        used = () if gamma == 1 else heads
        name = f"initial token x {gamma:g}"
        plan = plan_of_heads(scene, InitialToken(gamma), used, name)
        return ZeroTuned(plan, up, down, gamma, scores)

    def _types(self, scene: Scene, objective: Objective) -> tuple[Heads, Heads]:
        """Heads that profit from more weight on the first token, and those that do from less."""
        untouched = objective(treating(scene, InitialToken(), ()))
        types: dict[bool, list[Heads]] = {True: [], False: []}
        for heads in self._sets(scene):
            gain = objective(treating(scene, InitialToken(self.trial), heads)) - untouched
            if abs(gain) > SAME:
                types[(gain > 0) == (self.trial > 1)].append(heads)
        up, down = (tuple(head for heads in types[kind] for head in heads) for kind in types)
        return up, down

    def _sets(self, scene: Scene) -> list[Heads]:
        """The heads that are judged together."""
        every = every_head(scene.chain)
        if not self.shared:
            return [(head,) for head in every]
        numbers = sorted({number for _, number in every})
        return [tuple(head for head in every if head[1] == number) for number in numbers]


def _distance(gamma: float) -> float:
    """How far a factor is from 1."""
    return abs(math.log(gamma)) if gamma else math.inf


CARD = SearcherCard(
    name="zero_tuning",
    build=ZeroTuning,
    finds="plan",
    papers=(Paper("2505.11739", "ZeroTuning: Unlocking the Initial Token's Power", 2025),),
    claim=Claim(
        "some heads predict better with more weight on the first token, some with less",
        "regard study first_token_by_head",
    ),
)
