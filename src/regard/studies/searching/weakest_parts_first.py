r"""Weakest parts first: a model loses less without the heads and units that add least to its stream
than without random ones, and tuned on it gets back most of that.

    head h:  1/N sum_n |o_nh W_h|_1        unit i:  1/N sum_n |u_ni|        the least go

Differs from the paper: a pocket model is judged by its loss on text, not by tasks of reasoning.
Its answers to needles are shown but not judged: up to half of the random models answer them better,
since what is measured is how large a part is, on text, and not what it does. Query heads go in
groups with the keys they share, of which each layer has two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from regard.core.card import Claim
from regard.core.errors import ArgumentError
from regard.core.study import Curve, Figure, Outcome, Progress, StudyCard
from regard.recipes.losses import of_task
from regard.recipes.tuning import tuned
from regard.searchers.amp import CARD as SEARCHER
from regard.searchers.amp import amp
from regard.searchers.judging import judged
from regard.studies.searching.needles import pocket, questions
from regard.studies.searching.random_parts import random_models
from regard.studies.searching.texts import texts
from regard.tasks.text import Text


@dataclass(frozen=True)
class WeakestPartsFirst:
    """ratio: of all parameters that go; length: tokens of a text, and of a needle's question;
    shown: texts that parts are measured on; exam: texts and questions that are judged by; others:
    random models; steps, rows, rank, rate: of tuning.
    """

    ratio: float = 0.3
    length: int = 256
    shown: int = 48
    exam: int = 32
    others: int = 8
    steps: int = 200
    rows: int = 8
    rank: int = 16
    rate: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.2 <= self.ratio <= 0.5:
            raise ArgumentError("ratio", "0.2 to 0.5, so that groups of heads go", self.ratio)
        if self.others < 1:
            raise ArgumentError("others", "at least 1", self.others)

    def run(self, progress: Progress) -> Outcome:
        """Take parts away, the weakest and random ones, and tune what is left of the former."""
        model, (text, asked) = pocket(), self.exam_of()

        def losses(one: Any) -> np.ndarray:
            return np.array([-judged(one, given, "loss") for given in (text, asked)])

        whole = losses(model)
        found = amp(model, texts(self.length, self.shown, "valid", self.seed), self.ratio)
        own, others = losses(found.model) - whole, []
        for one in random_models(model, found.kept, self.others, self.seed):
            others.append(losses(one) - whole)
            progress(0.3 * len(others) / self.others)
        lessons = of_task(Text(self.length).batches("train", self.rows, self.seed))
        after = tuned(
            found.model,
            lessons,
            self.steps,
            rank=self.rank,
            rate=self.rate,
            watch=lambda step: progress(0.3 + 0.7 * step.done / self.steps),
        )
        return self.outcome(own, np.array(others), losses(after) - whole)

    def exam_of(self) -> tuple[list[Any], list[Any]]:
        """The texts and the questions that are judged by."""
        asked = questions(self.length, self.exam, "test", self.seed)
        return texts(self.length, self.exam, "test", self.seed), asked

    def outcome(self, own: np.ndarray, others: np.ndarray, after: np.ndarray) -> Outcome:
        """Of rises of the losses (text, needles): without the weakest, without random parts
        (others, 2), and without the weakest after tuning.
        """
        less, back = "less than without random parts", "most of what was lost comes back"
        figures = (
            Figure("rise, of random ones' mean", float(own[0] / others[:, 0].mean()), less, high=1),
            Figure("rise, of random ones' least", float(own[0] / others[:, 0].min()), less, high=1),
            Figure("rise left by tuning", float(after[0] / own[0]), back, high=0.5),
        )
        curves = []
        for kind, title in enumerate(("text", "needles (not judged)")):
            ordered = [(float(i), float(x)) for i, x in enumerate(np.sort(others[:, kind]))]
            lines = {"random parts": ordered}
            for name, x in (("weakest", own), ("weakest, tuned", after)):
                lines[name] = [(0.0, float(x[kind])), (float(len(others) - 1), float(x[kind]))]
            curves.append(Curve(f"Rise of the loss of {title}", "model", "nats", lines))
        return Outcome(figures, tuple(curves))


CARD = StudyCard(
    name="weakest_parts_first",
    build=WeakestPartsFirst,
    papers=SEARCHER.papers,
    claim=Claim(
        "the heads and units that add least to the stream are those to take away, and tuning gets"
        " back most of what they gave",
        "regard study weakest_parts_first",
    ),
    seconds=40,
    small={"length": 48, "shown": 2, "exam": 2, "others": 2, "steps": 2, "rows": 2},
)
