r"""Relations teach: a small student that first learns how a teacher's tokens attend, and how their
values relate, finds the use of it soon; one that learns from data alone for as long does not.

    teach: KL(teacher || student) of softmax(Q K^T) and softmax(V V^T)        tune: -log p(target)

The task is copying: what followed a symbol follows it again. The teacher is the pocket model, the
student half as wide, with the two layers that copying takes.

Differs from the paper: the student is taught by the teacher's second layer and not by its last. The
second one looks at what followed before; the last one spreads its attention over many tokens, and a
student that learns from that does worse than from data alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.study import Curve, Figure, Outcome, Progress, StudyCard
from regard.recipes.llama import random_llama
from regard.recipes.losses import hard_loss, inputs_of, of_task
from regard.recipes.minilm import minilm
from regard.recipes.pocket_phases import SHAPE
from regard.recipes.training import Progress as Step
from regard.recipes.training import Watch
from regard.recipes.tuning import tuned
from regard.studies.searching.needles import pocket
from regard.tasks.induction import Induction

RATE = 3e-3
Trace = list[tuple[float, float]]


@dataclass(frozen=True)
class RelationsTeach:
    """width, layers: of the student; layer: of the teacher; length: tokens of an example, longest:
    of what is repeated in it; taught, tuned: steps of both parts of the training; rows: examples of
    a step; exam: examples that are judged by.
    """

    width: int = 64
    layers: int = 2
    layer: int = 1
    length: int = 64
    longest: int = 24
    taught: int = 300
    tuned: int = 150
    rows: int = 32
    exam: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.taught, self.tuned) < 1:
            raise ArgumentError("taught, tuned", "at least 1", (self.taught, self.tuned))

    def run(self, progress: Progress) -> Outcome:
        """Train one student both ways, each for as many steps."""
        teacher, steps = pocket(), self.taught + self.tuned
        traces: dict[str, Trace] = {"data alone": [], "relations first": []}

        def watch(name: str, first: int, before: int = 0) -> Watch:
            def see(step: Step) -> None:
                progress((before + first + step.done) / (2 * steps))
                if "hard" in step.losses:
                    traces[name].append((float(first + step.done), step.losses["hard"]))

            return see

        plain, taught = self.student(), self.student()
        tuned(plain, self.lessons(), steps, rate=RATE, watch=watch("data alone", 0))
        name, lessons = "relations first", self.lessons()
        given: dict[str, Any] = {"layer": self.layer, "assistant": False, "rate": RATE}
        minilm(teacher, taught, lessons, self.taught, **given, watch=watch(name, 0, steps))
        tuned(taught, lessons, self.tuned, rate=RATE, watch=watch(name, self.taught, steps))
        return self.outcome(self.loss(teacher), self.loss(plain), self.loss(taught), traces)

    def student(self) -> Any:
        """An untrained student; the seed says which."""
        sizes = {"hidden_size": self.width, "intermediate_size": 2 * self.width}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return random_llama({**SHAPE, **sizes, "num_hidden_layers": self.layers}).eval()

    def lessons(self) -> Iterator[Mapping[str, Tensor]]:
        """Examples to learn from."""
        return of_task(self.task().batches("train", self.rows, self.seed))

    def task(self) -> Induction:
        """What is learned."""
        return Induction(self.length, 4, self.longest, examples=self.exam)

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        """Mean loss of what is to be copied, in nats."""
        exam = next(of_task(self.task().batches("test", self.exam, self.seed)))
        return float(hard_loss(model(**inputs_of(exam)).logits, exam))

    def outcome(
        self, teacher: float, plain: float, taught: float, traces: Mapping[str, Trace]
    ) -> Outcome:
        """Of the losses of the teacher and of both students, and how these fell."""
        left = (taught - teacher) / (plain - teacher)
        expected = "attention and value relations alone teach"
        figures = (Figure("loss above the teacher's, of data alone", left, expected, high=0.5),)
        return Outcome(figures, (Curve("Loss of copies", "step", "nats", traces),))


CARD = StudyCard(
    name="relations_teach",
    build=RelationsTeach,
    papers=(
        Paper(
            "2002.10957",
            "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained "
            "Transformers",
            2020,
        ),
    ),
    claim=Claim(
        "a narrower student that first learns a layer's attention and value relations copies when"
        " one trained as long on data alone does not yet",
        "regard study relations_teach",
    ),
    seconds=45,
    small={"taught": 2, "tuned": 2, "rows": 2, "exam": 2, "length": 32, "longest": 8},
)
