r"""Few heads retrieve: a few heads, found one after the other, undo what a whole layer undoes.

    S <- S + the head whose even weights, beside those of S, harm the answers most

are set beside as many heads at random and beside every whole layer. Differs from the paper: there
heads of a diffusion model are perturbed in a second pass that guides the first, here heads of a
language model give every key the same weight in its only pass, and what is looked for is harm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from regard.core.card import Claim
from regard.core.errors import ArgumentError
from regard.core.scene import Scene
from regard.core.study import Curve, Figure, Outcome, Progress, StudyCard
from regard.searchers.greedy_heads import CARD as SEARCHER
from regard.searchers.greedy_heads import greedy_heads
from regard.searchers.head_sets import Heads, Treated, every_head, judging, treating
from regard.studies.searching.needles import pocket, questions
from regard.treatments.uniform_heads import UniformHeads


@dataclass(frozen=True)
class FewHeadsRetrieve:
    """heads: chosen one after the other; controls: random sets of as many; length: tokens of a
    needle's question; questions: how many are searched on, and how many are asked.
    """

    heads: int = 2
    controls: int = 24
    length: int = 192
    questions: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.heads <= 4 or self.controls < 1:
            got = (self.heads, self.controls)
            raise ArgumentError("heads, controls", "1 to 4, at least 1", got)

    def run(self, progress: Progress) -> Outcome:
        """Search, then ask other questions with the heads found, random ones and whole layers."""
        model, even = pocket(), UniformHeads()
        shown = Scene.of(model, questions(self.length, self.questions, "valid", self.seed))
        exam = Scene.of(model, questions(self.length, self.questions, "test", self.seed))
        score, asked = judging(shown, "loss"), judging(exam, "loss")

        def harm(treated: Treated) -> float:
            return -score(treated)

        found = greedy_heads(
            shown, even, harm, 1, self.heads, progress=lambda done, _: progress(0.7 * done)
        )
        every, random = every_head(exam.chain), np.random.default_rng(self.seed)
        drawn: list[Heads] = [
            tuple(every[i] for i in random.choice(len(every), self.heads, replace=False))
            for _ in range(self.controls)
        ]
        layers: list[Heads] = [tuple((site, h) for h in range(site.heads)) for site in exam.chain]
        untouched = asked(treating(exam, even, ()))
        own, others, whole = (
            np.array([untouched - asked(treating(exam, even, heads)) for heads in sets])
            for sets in ([found.heads[: n + 1] for n in range(self.heads)], drawn, layers)
        )
        left = judging(exam, "accuracy")(treating(exam, even, found.heads))
        progress(1.0)
        return self.outcome(own, others, whole, left)

    def outcome(
        self, own: np.ndarray, others: np.ndarray, whole: np.ndarray, left: float
    ) -> Outcome:
        """Of the rises of the loss with the heads found, random ones and whole layers."""
        better, layer = "more than random heads do", "what the best whole layer does"
        figures = (
            Figure(
                "rise, random heads, of the own", float(others.mean() / own[-1]), better, high=0.5
            ),
            Figure(
                "random sets that do as much", float((others >= own[-1]).mean()), better, high=0.2
            ),
            Figure("rise, of the best layer's", float(own[-1] / whole.max()), layer, low=0.5),
            Figure("accuracy left", left, layer, high=0.25),
        )
        steps = range(1, len(own) + 1)
        lines = {
            "one after the other": [(float(n), float(x)) for n, x in zip(steps, own, strict=True)],
            "at random, mean": [(float(len(own)), float(others.mean()))],
            **{
                f"layer {number}, whole": [(1.0, float(x)), (float(len(own)), float(x))]
                for number, x in enumerate(whole)
            },
        }
        return Outcome(
            figures, (Curve("Rise of the loss", "heads with even weights", "nats", lines),)
        )


CARD = StudyCard(
    name="few_heads_retrieve",
    build=FewHeadsRetrieve,
    papers=SEARCHER.papers,
    claim=Claim(
        "two heads, found one after the other, undo retrieval as a whole layer does",
        "regard study few_heads_retrieve",
    ),
    seconds=10,
    small={"heads": 1, "controls": 2, "length": 64, "questions": 2},
)
