r"""First token by head: some heads predict better with more weight on the first token, some with
less, and one number for those of the larger type lowers the loss of text that was not searched on.

    effect(l, h) = score(gamma in head (l, h) alone) - score(untouched)

Differs from the paper: the score is the loss of the next byte, since the pocket model answers its
questions without a fault; heads are judged in each layer by themselves, as there are four in each;
and what is gained is little. Less entropy, which the paper goes by where there are no answers,
is found on other text too, but is no sign of a lower loss here: the pocket model grows bolder,
not better.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from regard.core.card import Claim
from regard.core.scene import Scene
from regard.core.study import Curve, Figure, Outcome, Progress, StudyCard
from regard.searchers.head_sets import Head, Heads, every_head, judging, treating
from regard.searchers.judging import By
from regard.searchers.zero_tuning import CARD as SEARCHER
from regard.searchers.zero_tuning import ZeroTuned, ZeroTuning
from regard.studies.searching.needles import pocket
from regard.studies.searching.texts import texts
from regard.treatments.initial_token import InitialToken

BOTH = "heads of both types, up-effective and down-effective"
BOLD = "a gain in the paper, where there are no answers to go by; at pocket size a loss"


@dataclass(frozen=True)
class FirstTokenByHead:
    """trial: the gamma that heads are classified with; length: bytes of a piece of text; pieces:
    how many are searched on, and how many are predicted.
    """

    trial: float = 2.0
    length: int = 31
    pieces: int = 256
    seed: int = 0

    def run(self, progress: Progress) -> Outcome:
        """Search by the loss and by the entropy, then predict other text."""
        model = pocket()
        shown = Scene.of(model, texts(self.length, self.pieces, "valid", self.seed))
        exam = Scene.of(model, texts(self.length, self.pieces, "test", self.seed))
        found: dict[By, ZeroTuned] = {}
        gains: dict[By, float] = {}
        measures: tuple[By, By] = ("loss", "entropy")
        for number, by in enumerate(measures):
            progress(number / 3)
            found[by] = ZeroTuning(trial=self.trial, by=by, shared=False).run(shown)
            gains[by] = gain(exam, found[by].gamma, found[by].heads, by)
        progress(2 / 3)
        best, every = found["loss"], every_head(exam.chain)
        bold = gain(exam, found["entropy"].gamma, found["entropy"].heads, "loss")
        together = gain(exam, best.gamma, every, "loss")
        alone = {head: gain(exam, self.trial, (head,), "loss") for head in every}
        progress(1.0)
        chosen, lower = "the larger type is scaled alone", "a gain"
        figures = (
            Figure("heads of the smaller type", min(len(best.up), len(best.down)), BOTH, low=1),
            Figure("up less down on other text, nats", apart(alone, best), BOTH, low=0.0),
            Figure("loss lowered on other text, nats", gains["loss"], lower, low=0.0),
            Figure("less all heads alike, nats", gains["loss"] - together, chosen, low=0.0),
            Figure("entropy lowered on other text, nats", gains["entropy"], "lower", low=0.0),
            Figure("loss lowered by the entropy's choice, nats", bold, BOLD, high=0.0),
        )
        lines = {
            by: [(gamma, one.scores[gamma] - one.untouched) for gamma in sorted(one.scores)]
            for by, one in found.items()
        }
        return Outcome(figures, (Curve("Gain of the larger type", "gamma", "nats", lines),))


def gain(scene: Scene, gamma: float, heads: Heads, by: By) -> float:
    """By how much a score rises with some heads under one gamma."""
    objective = judging(scene, by)
    untouched = objective(treating(scene, InitialToken(), ()))
    return objective(treating(scene, InitialToken(gamma), heads)) - untouched


def apart(alone: dict[Head, float], found: ZeroTuned) -> float:
    """Mean effect of the heads of one type less that of the other; 0 where a type is empty."""
    up, down = ([alone[head] for head in heads] for heads in (found.up, found.down))
    return float(np.mean(up) - np.mean(down)) if up and down else 0.0


CARD = StudyCard(
    name="first_token_by_head",
    build=FirstTokenByHead,
    papers=SEARCHER.papers,
    claim=Claim(
        "more weight on the first token helps some heads to predict, less helps others",
        "regard study first_token_by_head",
    ),
    seconds=30,
    small={"length": 15, "pieces": 4},
)
