r"""Windows by head: fitted to each head, windows that grow with the prompt keep what one window of
the same density for all heads loses.

    window_h(N) = alpha_h + beta_h N        chosen at some lengths, judged at a longer one

Two other plans read as much: one window for all heads, and the windows found, dealt to the heads at
random. Differs from the paper: prompts are of hundreds of tokens, and blocks of 16.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regard.core.card import Claim
from regard.core.errors import ArgumentError
from regard.core.passage import Passage
from regard.core.study import Curve, Figure, Outcome, Progress, StudyCard
from regard.plan import Plan, Step
from regard.searchers.elastic_spans import CARD as SEARCHER
from regard.searchers.elastic_spans import ElasticSpans
from regard.searchers.fitting import decoder_sites
from regard.searchers.own_answers import own_answers
from regard.searchers.rules import Group, groups_of
from regard.studies.searching.needles import pocket, questions, scores
from regard.tasks.task import Split


@dataclass(frozen=True)
class WindowsByHead:
    """density: of all plans, at every length. profiled: tokens of the questions that windows are
    fitted to; unseen: of those they are chosen by and, other ones, judged on. block: tokens.
    questions: of each length. deals: how often the windows are dealt to other heads.
    """

    density: float = 0.5
    profiled: tuple[int, ...] = (128, 256, 512)
    unseen: int = 768
    block: int = 16
    questions: int = 16
    deals: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.profiled or self.unseen <= max(self.profiled):
            raise ArgumentError("unseen", "a length above the profiled ones", self.unseen)
        if self.deals < 1:
            raise ArgumentError("deals", "at least 1", self.deals)

    def run(self, progress: Progress) -> Outcome:
        """Fit the windows to the model's own answers, and try them beside the others."""
        model = pocket()
        shown = [p for length in self.profiled for p in self._asked(length, "train")]
        own = own_answers(model, shown, 3)
        search = ElasticSpans(self.density, block=self.block)
        unseen = self._asked(self.unseen, "valid")
        found = search.run(model, own, unseen, lambda part, _: progress(part / 2))
        heads = groups_of(decoder_sites(model))
        random = np.random.default_rng(self.seed)
        dealt = [_dealt(found.plan, heads, random) for _ in range(self.deals)]
        plans = [found.plan, self.one_window, *dealt, Plan()]
        lengths = (*self.profiled, self.unseen)
        losses = []
        for index, length in enumerate(lengths):
            losses.append(-np.array(scores(model, self._asked(length, "test"), plans, "loss")))
            progress((1 + (index + 1) / len(lengths)) / 2)
        return self.outcome(lengths, np.array(losses))

    @property
    def one_window(self) -> Plan:
        """The window of this density, its first block included, for all heads."""
        options: dict[str, Any] = {"alpha": -self.block, "beta": self.density, "block": self.block}
        return Plan(steps=(Step(treatment="moa", options=options),))

    def _asked(self, length: int, split: Split) -> list[Passage]:
        """Questions that are read with their answers as `length` tokens."""
        return questions(length - 1, self.questions, split, self.seed)

    def outcome(self, lengths: Sequence[int], losses: np.ndarray) -> Outcome:
        """Of losses (lengths, plans): the one found, one window, those dealt, and none."""
        fitted, one, whole = losses[:, 0], losses[:, 1], losses[:, -1]
        dealt = losses[:, 2:-1].mean(1)
        kept, less = "less is lost than under one window", "what a head needs is its own"
        figures = (
            Figure(
                "loss at the unseen length, of one window's", _last(fitted, one), kept, high=0.7
            ),
            Figure("loss there, of that of dealt windows", _last(fitted, dealt), less, high=0.7),
        )
        named = {"by head": fitted, "one window": one, "dealt": dealt, "untouched": whole}
        lines = {
            name: [(float(n), float(y)) for n, y in zip(lengths, values, strict=True)]
            for name, values in named.items()
        }
        return Outcome(figures, (Curve("Loss of the answers", "tokens", "nats", lines),))


def _last(some: np.ndarray, others: np.ndarray) -> float:
    """The ratio at the last length."""
    return float(some[-1] / others[-1])


def _dealt(plan: Plan, heads: Sequence[Group], random: np.random.Generator) -> Plan:
    """A plan with its rules given to other key heads at random."""
    moved = dict(zip(heads, random.permutation(len(heads)).tolist(), strict=True))
    steps = []
    for step in plan.steps:
        layers, own = tuple(step.layers), tuple(step.kv_heads or ())
        for layer, head in itertools.product(layers, own):
            to = heads[moved[Group(int(layer), int(head))]]
            places = {"layers": (to.layer,), "kv_heads": (to.kv_head,)}
            steps.append(step.model_copy(update=places))
    return Plan(steps=tuple(steps))


CARD = StudyCard(
    name="windows_by_head",
    build=WindowsByHead,
    papers=SEARCHER.papers,
    claim=Claim(
        "windows fitted to each head keep what one window of the same density for all loses",
        "regard study windows_by_head",
    ),
    seconds=30,
    small={"profiled": (64,), "unseen": 96, "questions": 2, "deals": 1},
)
