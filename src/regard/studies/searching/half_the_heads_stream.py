r"""Half the heads stream: a model still finds needles where only the key heads whose gates stay
open read all of the past, and the other half its first and newest tokens.

    key head c reads everything                   gate alpha_c among the `dense` largest
    key head c reads first and newest tokens      otherwise

Gates learn on questions after many facts, from the states of the untouched model. The plan they
give is set beside every other with as many heads that read everything. Differs from the paper: two
key heads of the eight do most of it, and streams are of tens of tokens, not hundreds.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from regard.core.card import Claim
from regard.core.errors import ArgumentError
from regard.core.study import Curve, Figure, Map, Outcome, Progress, StudyCard
from regard.plan import Plan
from regard.recipes.duo_plan import plan_from_gates
from regard.searchers.retrieval_gates import CARD as SEARCHER
from regard.searchers.retrieval_gates import RetrievalGates
from regard.studies.searching.needles import pocket, questions, scores
from regard.tasks.needle import Needle

FACTS = 8
"""Facts of a passage that gates learn on, all of them asked."""


@dataclass(frozen=True)
class HalfTheHeadsStream:
    """dense: key heads that read everything; sinks, recent: what the others read; steps: of
    training gates, two passages of `shown` tokens each; length: tokens of a needle's question;
    questions: how many are asked.
    """

    dense: int = 4
    sinks: int = 16
    recent: int = 32
    steps: int = 60
    shown: int = 256
    length: int = 384
    questions: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.dense <= 7:
            raise ArgumentError("dense", "1 to 7 key heads", self.dense)

    def run(self, progress: Progress) -> Outcome:
        """Learn gates, and try every choice of as many heads."""
        model, stream = pocket(), (self.sinks, self.recent)
        batches = Needle(self.shown, FACTS, asked=FACTS).batches("train", 2, self.seed)
        share = 1 - self.dense / (model.config.num_hidden_layers * model.config.num_key_value_heads)
        search = RetrievalGates(share, self.steps, stream, stream)
        found = search.run(model, batches, lambda part, _: progress(part / 4))
        every = self.choices(found.gates)
        plans = [plan_from_gates(gates, share, *stream) for gates in every]
        exam = questions(self.length, self.questions, "test", self.seed)
        right = []
        for index, plan in enumerate([found.plan, *plans, Plan()]):
            right += scores(model, exam, [plan], "accuracy")
            progress((1 + 3 * (index + 1) / (len(plans) + 2)) / 4)
        return self.outcome(found.gates, np.array(right))

    def choices(self, gates: Tensor) -> list[Tensor]:
        """Gates like these, 1 at each set of `dense` heads and 0 elsewhere."""
        found = []
        for heads in itertools.combinations(range(gates.numel()), self.dense):
            chosen = torch.zeros(gates.numel())
            chosen[list(heads)] = 1
            found.append(chosen.view_as(gates))
        return found

    def outcome(self, gates: Tensor, right: np.ndarray) -> Outcome:
        """Of the shares answered right: by the plan found, by every plan, by none."""
        own, every, whole = right[0], right[1:-1], right[-1]
        ordered = gates.flatten().sort().values
        gap = float(ordered[-self.dense :].mean() - ordered[: -self.dense].mean())
        better = float((every > own + 1e-9).mean())
        intact, lost = "intact", "lost: other heads do not retrieve"
        closed = "apart: a penalty closes the gates of heads that need no past"
        figures = (
            Figure("needles, by gates, of the untouched", float(own / whole), intact, low=0.9),
            Figure(
                "needles, any heads, of the untouched", float(every.mean() / whole), lost, high=0.75
            ),
            Figure("share of choices that keep more", better, "fewer than at random", high=0.25),
            Figure("gates of dense heads above the others", gap, closed, low=0.3),
        )
        points = [(float(i), float(x)) for i, x in enumerate(np.sort(every))]
        lines = {"all choices": points, "by gates": [(0.0, own), (points[-1][0], own)]}
        curve = Curve("Tokens of needles answered", "choice of heads, by its share", "share", lines)
        return Outcome(figures, (curve,), (Map("Gates", "layer", "key head", gates.tolist()),))


CARD = StudyCard(
    name="half_the_heads_stream",
    build=HalfTheHeadsStream,
    papers=SEARCHER.papers,
    claim=Claim(
        "half the key heads need only sinks and recent tokens, and retrieval stays intact",
        "regard study half_the_heads_stream",
    ),
    seconds=25,
    small={"dense": 1, "steps": 2, "shown": 96, "length": 64, "questions": 2},
)
