r"""Calibrated heads: without their sinks most heads predict worse and a few as well or better, so
that which are calibrated must be found by trial.

    gain(l, h) = score(only (l, h) calibrated) - score(untouched)

Differs from the paper: the score is the loss of the next byte, not the accuracy of questions, which
the pocket model answers without a fault; all of its four layers are tried, where the paper leaves
out the first two and the last; and while the same heads gain on other text, what they gain there
together, less than a thousandth of the loss, is not told from nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from regard.core.card import Claim
from regard.core.scene import Scene
from regard.core.study import Curve, Figure, Map, Outcome, Progress, StudyCard
from regard.lenses.agreement import spearman
from regard.searchers.calibration_sets import CARD as SEARCHER
from regard.searchers.calibration_sets import CalibrationSets
from regard.searchers.head_sets import every_head, judging, treating
from regard.studies.searching.needles import pocket
from regard.studies.searching.texts import texts

NEXT = "a gain in the paper; at pocket size next to nothing"


@dataclass(frozen=True)
class CalibratedHeads:
    """length: bytes of a piece of text; pieces: how many heads are tried on, and how many are
    predicted.
    """

    length: int = 31
    pieces: int = 512
    seed: int = 0

    def run(self, progress: Progress) -> Outcome:
        """Try every head on some text and again on other text."""
        model = pocket()
        shown = Scene.of(model, texts(self.length, self.pieces, "valid", self.seed))
        exam = Scene.of(model, texts(self.length, self.pieces, "test", self.seed))
        search = CalibrationSets(by="loss", skip_first=0, skip_last=0)
        found = search.run(shown, lambda done, _: progress(0.45 * done))
        again = search.run(exam, lambda done, _: progress(0.45 + 0.45 * done))
        objective = judging(exam, "loss")
        chosen, every = (
            objective(treating(exam, search.treatment, heads)) - again.untouched
            for heads in (found.heads, every_head(exam.chain))
        )
        progress(1.0)
        gains, others = (torch.tensor(list(one.gains.values())) for one in (found, again))
        alike = float(spearman(gains[None], others[None]))
        mine = torch.tensor([head in found.heads for head in found.gains])
        ahead = float(others[mine].mean() - others[~mine].mean()) if found.heads else 0.0
        trial = "kept are the heads that gain when calibrated alone"
        figures = (
            Figure(
                "heads that gain", len(found.heads), "some, not all", low=1, high=len(gains) / 2
            ),
            Figure("their gain on other text, more than others', nats", ahead, trial, low=0.0),
            Figure("gains on other text, rank correlation", alike, trial, low=0.5),
            Figure("loss lowered with all heads, nats", every, "they are chosen", high=0.0),
            Figure("lowered with those that gain, of that", chosen / abs(every), NEXT, low=-0.1),
        )
        order = gains.argsort()
        lines = {
            name: [(float(i), float(x)) for i, x in enumerate(values[order])]
            for name, values in {"tried on": gains, "other text": others}.items()
        }
        heads = Map("Gain, nats", "layer", "head", gains.reshape(len(exam.chain), -1).tolist())
        curve = Curve("Gain of every head alone", "head, by its gain", "nats", lines)
        return Outcome(figures, (curve,), (heads,))


CARD = StudyCard(
    name="calibrated_heads",
    build=CalibratedHeads,
    papers=SEARCHER.papers,
    claim=Claim(
        "most heads predict worse without their sinks, a few do not, and trials tell them apart",
        "regard study calibrated_heads",
    ),
    seconds=15,
    small={"length": 23, "pieces": 8},
)
