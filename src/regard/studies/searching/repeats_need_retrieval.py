r"""Repeats need retrieval: without its retrieval heads a model reads texts that repeat worse than
texts that do not.

    score(x) = (L'(x) - L(x)) / L(x)        L': loss with the retrieval heads attending to all alike

Half of the texts hold a segment of symbols twice; the others are the same texts with fresh symbols
instead of the repetition. As many heads that do not retrieve are the control. Differs from the
paper: four of the pocket model's sixteen heads retrieve, not one of twenty, and text of any kind
needs them, so that texts are compared with their like alone, and nothing is trained on what is
kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product

import numpy as np
import torch
from torch import Tensor

from regard.core.card import Claim
from regard.core.errors import ArgumentError
from regard.core.passage import Passage
from regard.core.study import Curve, Figure, Outcome, Progress, StudyCard
from regard.recipes.retrieval_heads import retrieval_scores
from regard.searchers.sample_influence import CARD as SEARCHER
from regard.searchers.sample_influence import Influential, SampleInfluence, top_heads
from regard.studies.searching.needles import ROWS, pocket
from regard.tasks.induction import Induction
from regard.tasks.needle import Needle
from regard.tasks.task import IGNORED
from regard.tasks.vocabulary import FIRST_SYMBOL, SYMBOLS

SHORTEST, LONGEST = 8, 16  # symbols of a segment
Pair = tuple[int, int]


@dataclass(frozen=True)
class RepeatsNeedRetrieval:
    """heads: share of the heads that is said to retrieve; keep: share of the texts that is kept;
    texts: of each sort, of `length` tokens; controls: draws of other heads; questions: answered to
    find the heads.
    """

    heads: float = 0.25
    keep: float = 0.2
    texts: int = 32
    length: int = 192
    controls: int = 6
    questions: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.heads <= 0.5 or self.controls < 1:
            got = (self.heads, self.controls)
            raise ArgumentError("heads, controls", "above 0, at most a half; at least 1", got)

    def run(self, progress: Progress) -> Outcome:
        """Score the texts by the heads that retrieve, then by others."""
        model, search = pocket(), SampleInfluence(keep=self.keep)
        rows = min(ROWS, self.questions)
        asked = Needle(self.length).questions("valid", rows, self.seed)
        scores = retrieval_scores(model, islice(asked, -(-self.questions // rows)))
        sets = self.sets(top_heads(scores, self.heads), scores)
        texts = [Passage({"input_ids": ids}, ids) for ids in self.written()]
        found = []
        for index, heads in enumerate(sets):
            progress(index / len(sets))
            found.append(search.by_heads(model, heads, texts))
        progress(1.0)
        return self.outcome(found)

    def sets(self, own: Sequence[Pair], scores: Tensor) -> list[Sequence[Pair]]:
        """The heads (layer, head) that retrieve, and draws of as many others."""
        random = np.random.default_rng(self.seed)
        others = [head for head in product(*map(range, scores.shape)) if head not in own]
        drawn = [random.permutation(len(others))[: len(own)] for _ in range(self.controls)]
        return [own, *([others[i] for i in some] for some in drawn)]

    def written(self) -> tuple[Tensor, Tensor]:
        """Texts (texts, length) without and with a repetition, which is their end."""
        task = Induction(self.length, SHORTEST, LONGEST, "text", examples=self.texts)
        batch = next(task.batches("test", self.texts, self.seed))
        again, random = batch.targets != IGNORED, np.random.default_rng(self.seed)
        order = torch.from_numpy(random.random((self.texts, SYMBOLS)))
        used = batch.inputs - FIRST_SYMBOL
        order.scatter_(1, used.clamp_min(0), 2.0)  # last: symbols that stand there already
        fresh = FIRST_SYMBOL + order.argsort(1)
        told = fresh.gather(1, (again.cumsum(1) - 1).clamp_min(0))
        return torch.where(again, told, batch.inputs), batch.inputs

    def outcome(self, found: Sequence[Influential]) -> Outcome:
        """Of what the heads that retrieve find, and what others find."""
        (told, gap), *others = [told_apart(*one.scores) for one in found]
        right = sum(number for number, _ in found[0].kept) / len(found[0].kept)
        chance = sum(x for x, _ in others) / len(others)
        rest = sum(x for _, x in others) / len(others) / gap if gap else float("inf")
        need = "texts that need retrieval score higher"
        small = "random heads have a small effect"
        figures = (
            Figure("pairs of texts told apart", told, need, low=0.9),
            Figure("repeats among those kept", right, need + ": they are kept", low=0.9),
            Figure("pairs told apart, more than by other heads", told - chance, small, low=0.05),
            Figure("gap by other heads, of the gap by these", rest, small, high=0.5),
        )
        lines = {"heads that retrieve": found[0], "other heads": found[1]}
        curve = Curve(
            "Repeats among the texts of the highest scores", "share of the texts", "share",
            {name: shares(*one.scores) for name, one in lines.items()},
        )  # fmt: skip
        return Outcome(figures, (curve,))


def told_apart(low: Tensor, high: Tensor) -> tuple[float, float]:
    """The share of pairs of which the second scores higher, and the difference of the means."""
    more = (high[:, None] > low).double() + 0.5 * (high[:, None] == low).double()
    return float(more.mean()), float(high.mean() - low.mean())


def shares(low: Tensor, high: Tensor) -> list[tuple[float, float]]:
    """The share of the second among the highest scores of both, by how many are taken."""
    order = torch.cat([low, high]).argsort(descending=True, stable=True)
    hits = (order >= len(low)).double().cumsum(0)
    return [(i / len(order), float(x) / i) for i, x in enumerate(hits.tolist(), 1)]


CARD = StudyCard(
    name="repeats_need_retrieval",
    build=RepeatsNeedRetrieval,
    papers=SEARCHER.papers,
    claim=Claim(
        "texts that repeat what they said need the heads that retrieve, and not others as much",
        "regard study repeats_need_retrieval",
    ),
    seconds=15,
    small={"texts": 4, "length": 64, "controls": 2, "questions": 2},
)
