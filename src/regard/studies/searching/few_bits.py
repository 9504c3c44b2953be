r"""Few bits: weights that are rounded so that their errors make up for one another lose much less
than weights that are rounded one by one.

    divergence: mean over tokens of KL(model || rounded model)

Differs from the paper: of its three parts only the last, rounding by the second order, shows here.
A rotation spreads the outliers of large models; a pocket model has none, and rounding to the
nearest does worse when rotated. Tokens that count by what others attend to gain a few hundredths
on average, less than one rotation differs from another: shown, not judged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from regard.core.card import Claim
from regard.core.errors import ArgumentError
from regard.core.linears import blocks_of, weight_of
from regard.core.passage import Passage
from regard.core.study import Curve, Figure, Outcome, Progress, StudyCard
from regard.recipes.gptq import Grid
from regard.recipes.losses import soft_loss
from regard.recipes.rotation import rotated
from regard.recipes.rsq import CARD as RECIPE
from regard.recipes.rsq import rsq
from regard.recipes.token_importance import Importance
from regard.studies.searching.needles import pocket, questions
from regard.studies.searching.texts import texts

KINDS: tuple[Importance, ...] = ("uniform", "attention")
ORDER = ("nearest", "nearest, rotated", "second order, rotated", "weighted, rotated")


@dataclass(frozen=True)
class FewBits:
    """bits of a weight; clip: leave out extreme values; length: tokens of a text; shown: texts and
    questions to calibrate on, as many of both; exam: texts that are judged by; turns: rotations,
    each with a sample of its own.
    """

    bits: int = 3
    clip: bool = True
    length: int = 512
    shown: int = 8
    exam: int = 32
    turns: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.turns < 1:
            raise ArgumentError("turns", "at least 1", self.turns)

    def run(self, progress: Progress) -> Outcome:
        """Round a model in every way, and compare what it predicts."""
        model, exam = pocket(), texts(self.length, self.exam, "test", self.seed)
        found = np.zeros((self.turns, len(ORDER)))
        for turn in range(self.turns):
            for index, one in enumerate(self.rounded(model, self.seed * self.turns + turn)):
                found[turn, index] = divergence(model, one, exam)
                progress((turn * len(ORDER) + index + 1) / found.size)
        return self.outcome(found)

    def rounded(self, model: Any, seed: int) -> Iterator[Any]:
        """Copies of a model, in the order of `ORDER`."""
        yield nearest(model, self.bits, self.clip)
        yield nearest(rotated(model, seed), self.bits, self.clip)
        given = texts(self.length, self.shown, "valid", seed)
        given += questions(self.length, self.shown, "valid", seed)
        batches = [one.inputs for one in given]
        for kind in KINDS:
            yield rsq(model, batches, bits=self.bits, importance=kind, clip=self.clip, seed=seed)

    def outcome(self, found: np.ndarray) -> Outcome:
        """Of divergences (turns, 4)."""
        even, weighted = found[:, 2:].mean(0) / found[:, 0].mean()
        less = "less is lost than by rounding alone"
        figures = (
            Figure("divergence, of the nearest values'", float(weighted), less, high=0.5),
            Figure("the same, all tokens alike", float(even), less, high=0.5),
        )
        lines = {
            name: [(float(turn), float(x)) for turn, x in enumerate(found[:, index])]
            for index, name in enumerate(ORDER)
        }
        return Outcome(figures, (Curve("Divergence", "rotation and sample", "nats", lines),))


@torch.no_grad()
def nearest(model: Any, bits: int, clip: bool) -> Any:
    """A copy of a model with the weights of its blocks rounded one by one."""
    model = copy.deepcopy(model)
    for one in blocks_of(model):
        for module in one.all:
            weight = weight_of(module)
            weight.copy_(Grid.of(weight, bits, clip=clip).rounded(weight))
    return model


@torch.no_grad()
def divergence(model: Any, other: Any, exam: list[Passage]) -> float:
    """Mean divergence in nats of what the other predicts from what a model does."""
    real = [torch.ones_like(one.inputs["input_ids"], dtype=torch.bool) for one in exam]
    found = [
        soft_loss(other(**one.inputs).logits, model(**one.inputs).logits, every)
        for one, every in zip(exam, real, strict=True)
    ]
    return float(torch.stack(found).mean())


CARD = StudyCard(
    name="few_bits",
    build=FewBits,
    papers=RECIPE.papers,
    claim=Claim(
        "in three bits, weights whose errors make up for one another lose less than half of what"
        " the nearest values lose",
        "regard study few_bits",
    ),
    seconds=25,
    small={"clip": False, "length": 48, "shown": 2, "exam": 2, "turns": 1},
)
