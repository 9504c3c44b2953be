r"""Noisy parts first: gates that let noise in where a model does not mind it tell the parts it can
do without from random ones.

    x <- z x, z = mu + eps sigma        the parts with most noise, sigma^2 / mu^2, go

Gates alone are trained while the weights stay as they are ("faster"), or both ("full"); what is
left is set beside models of the same shape, made of random parts.

Differs from the paper: information weighs much for some dozens of steps, not little for thousands.
All heads keep their signal here, so that units alone go. The paper's finding that the heads to go
attend mostly to special tokens and to their own is not made again: eight groups of heads are few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from regard.core.card import Claim
from regard.core.errors import ArgumentError
from regard.core.study import Curve, Figure, Outcome, Progress, StudyCard
from regard.recipes.losses import of_task
from regard.searchers.judging import judged
from regard.searchers.slimming import Pruned
from regard.searchers.vtrans import CARD as SEARCHER
from regard.searchers.vtrans import Bottleneck, Variant, vtrans
from regard.studies.searching.needles import pocket
from regard.studies.searching.random_parts import random_models
from regard.studies.searching.texts import texts
from regard.tasks.text import Text


@dataclass(frozen=True)
class NoisyPartsFirst:
    """ratio: of all parameters that go; length: tokens of a text; steps, rows: of training;
    gate_rate, rate: learning rates of gates and of weights; exam: texts that are judged by; others:
    random models.
    """

    ratio: float = 0.4
    length: int = 256
    steps: int = 80
    rows: int = 8
    gate_rate: float = 0.1
    rate: float = 3e-4
    exam: int = 32
    others: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.others < 1:
            raise ArgumentError("others", "at least 1", self.others)

    def run(self, progress: Progress) -> Outcome:
        """Train gates and judge what is left, then as many random parts."""
        model, exam = pocket(), texts(self.length, self.exam, "test", self.seed)
        whole = judged(model, exam, "loss")
        gated = self.pruned(model, "faster", lambda share: progress(0.4 * share))
        both = self.pruned(model, "full", lambda share: progress(0.4 + 0.4 * share))
        own = [whole - judged(found.model, exam, "loss") for found in (gated, both)]
        others = []
        for one in random_models(model, gated.kept, self.others, self.seed):
            others.append(whole - judged(one, exam, "loss"))
            progress(0.8 + 0.2 * len(others) / self.others)
        return self.outcome(own[0], own[1], np.array(others))

    def pruned(self, model: Any, variant: Variant, progress: Progress) -> Pruned:
        """What training with gates leaves of a model."""
        return vtrans(
            model,
            of_task(Text(self.length).batches("train", self.rows, self.seed)),
            self.steps,
            self.ratio,
            variant=variant,
            options=Bottleneck(
                families=("heads", "units"), gate_rate=self.gate_rate, rate=self.rate
            ),
            seed=self.seed,
            watch=lambda step: progress(step.done / self.steps),
        )

    def outcome(self, gated: float, both: float, others: np.ndarray) -> Outcome:
        """Of the rise of the loss after training gates, gates and weights, and without random
        parts.
        """
        less, adapted = "less than without random parts", "weights that learn too lose less"
        figures = (
            Figure("rise, of random ones' mean", gated / float(others.mean()), less, high=1),
            Figure("rise, of random ones' least", gated / float(others.min()), less, high=1),
            Figure("rise, weights learned too, of gates alone", both / gated, adapted, high=1),
        )
        last = float(len(others) - 1)
        lines = {
            "random parts": [(float(i), float(x)) for i, x in enumerate(np.sort(others))],
            "noisiest": [(0.0, gated), (last, gated)],
            "noisiest, weights learned too": [(0.0, both), (last, both)],
        }
        return Outcome(figures, (Curve("Rise of the loss of text", "model", "nats", lines),))


CARD = StudyCard(
    name="noisy_parts_first",
    build=NoisyPartsFirst,
    papers=SEARCHER.papers,
    claim=Claim(
        "without the parts whose trained gates are noisiest a model loses less than without as many"
        " random ones",
        "regard study noisy_parts_first",
    ),
    seconds=35,
    small={"length": 32, "steps": 4, "rows": 2, "exam": 2, "others": 2},
)
