r"""Taught to share: inner layers that are made to use one attention map lose much at first, and
little once the model was distilled under that sharing.

    teach: mean (h - h_teacher)^2 + KL(teacher || student) - log p(target)    then: -log p(target)

Differs from the paper: it groups layers whose maps are alike. Those of a pocket model are not (the
two inner layers have a cosine near 0.1), so that sharing costs more before it is taught, and all
is left to the distillation. Answers to needles survive the sharing before and after; their losses
are shown and not judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count

from torch import Tensor

from regard.core.card import Claim
from regard.core.errors import ArgumentError
from regard.core.study import Curve, Figure, Outcome, Progress, StudyCard
from regard.plan import Plan
from regard.recipes.echo_att import CARD as RECIPE
from regard.recipes.echo_att import echo_att
from regard.recipes.losses import of_task
from regard.recipes.map_similarity import shared_plan
from regard.studies.searching.needles import pocket, questions, scores
from regard.studies.searching.texts import texts
from regard.tasks.needle import Needle
from regard.tasks.text import Text

BLOCK = (1, 2)
"""The inner layers of the pocket model."""


@dataclass(frozen=True)
class TaughtToShare:
    """length: tokens of a text, and of a needle's question; steps, adjusting: of distillation and
    after it; rows: texts or questions of a step; rate: of learning; exam: texts and questions that
    are judged by.
    """

    length: int = 256
    steps: int = 120
    adjusting: int = 20
    rows: int = 8
    rate: float = 1e-3
    exam: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.adjusting) < 1:
            raise ArgumentError("steps, adjusting", "at least 1", (self.steps, self.adjusting))

    def run(self, progress: Progress) -> Outcome:
        """Share the map of the inner layers, without teaching and with it."""
        model, plan = pocket(), shared_plan((BLOCK,))
        exams = (
            texts(self.length, self.exam, "test", self.seed),
            questions(self.length, self.exam, "test", self.seed),
        )
        losses = [[-x for x in scores(model, exam, [Plan(), plan], "loss")] for exam in exams]
        done = count(1)
        found = echo_att(
            model,
            (BLOCK,),
            self.lessons(),
            self.steps,
            adjusting=self.adjusting,
            rate=self.rate,
            watch=lambda _: progress(next(done) / (self.steps + self.adjusting)),
        )
        for own, exam in zip(losses, exams, strict=True):
            own.append(-scores(found.model, exam, [found.plan], "loss")[0])
        return self.outcome(*losses)

    def lessons(self) -> Iterator[Mapping[str, Tensor]]:
        """Texts and questions in turn."""
        asked = Needle(self.length, facts=8, asked=8)
        streams = [
            of_task(task.batches("train", self.rows, self.seed))
            for task in (Text(self.length), asked)
        ]
        while True:
            yield from map(next, streams)

    def outcome(self, text: list[float], needles: list[float]) -> Outcome:
        """Of both losses with maps apart, with a shared one, and with that one taught."""
        left = (text[2] - text[0]) / (text[1] - text[0])
        figures = (
            Figure("rise of the loss of text by sharing", text[1] - text[0], "some loss", low=0),
            Figure("rise left by teaching", left, "little, and not what it was", high=0.5),
        )
        lines = {
            name: [(float(i), x) for i, x in enumerate(own)]
            for name, own in (("text", text), ("needles", needles))
        }
        axis = "maps: 0 apart, 1 shared, 2 shared and taught"
        return Outcome(figures, (Curve("Losses", axis, "nats", lines),))


CARD = StudyCard(
    name="taught_to_share",
    build=TaughtToShare,
    papers=RECIPE.papers,
    claim=Claim(
        "of the loss that a shared map costs inner layers, distillation under the sharing gets most"
        " back",
        "regard study taught_to_share",
    ),
    seconds=30,
    small={"length": 80, "steps": 2, "adjusting": 1, "rows": 2, "exam": 2},
)
