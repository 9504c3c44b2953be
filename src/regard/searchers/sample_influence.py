r"""Sample influence: training texts are chosen by how much worse a model without retrieval reads
them.

    score(x) = (L'(x) - L(x)) / L(x)        L': loss with the retrieval heads attending to all alike

Heads are the top share by retrieval score. Scores are compared within a kind of data alone
(`domain`), and the top share of each kind is kept. A sample with an answer is judged by the answer.

The paper finds the heads by values asked of JSON objects; here any questions do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.passage import Passage
from regard.core.scene import Scene
from regard.core.searcher import SearcherCard
from regard.importance.retrieval import Count
from regard.probes.influence import attention_influence
from regard.recipes.retrieval_heads import retrieval_scores
from regard.searchers.judging import whole
from regard.searchers.series import Told
from regard.tasks.needle import Question

Sample = tuple[int, int]
"""A passage's number, and a row of it."""


@dataclass(frozen=True, eq=False)
class Influential:
    """What was found: the heads (layer, head), the scores (B,) of every passage's sequences, and
    the samples that are kept, by falling score within each kind of data.
    """

    heads: tuple[tuple[int, int], ...]
    scores: tuple[Tensor, ...]
    kept: tuple[Sample, ...]


@dataclass(frozen=True)
class SampleInfluence:
    """heads: share of the model's heads that is switched off, at least one. keep: share of the
    samples of each kind, at least one. count: see the probe `retrieval`.
    """

    heads: float = 0.05
    keep: float = 0.2
    count: Count = "set"

    def __post_init__(self) -> None:
        if not (0 < self.heads <= 1 and 0 < self.keep <= 1):
            raise ArgumentError("heads, keep", "shares in (0, 1]", (self.heads, self.keep))

    def run(
        self,
        model: Any,
        questions: Iterable[Question],
        passages: Sequence[Passage],
        progress: Told | None = None,
    ) -> Influential:
        """Find the heads that retrieve on questions, and score passages by them.

        Raises:
            ArgumentError: no question that the model answers, or no passage.
        """
        heads = top_heads(retrieval_scores(model, questions, count=self.count), self.heads)
        return self.by_heads(model, heads, passages, progress)

    def by_heads(
        self,
        model: Any,
        heads: Sequence[tuple[int, int]],
        passages: Sequence[Passage],
        progress: Told | None = None,
    ) -> Influential:
        """Score passages by heads (layer, head) that are known."""
        if not passages:
            raise ArgumentError("passages", "one or more", 0)
        scene, scores = Scene.of(model, [whole(passage) for passage in passages]), []
        for found in attention_influence(scene, heads):
            scores.append(found)
            if progress is not None:
                progress(len(scores) / len(passages), "scoring samples")
        kept: list[Sample] = []
        for domain in dict.fromkeys(passage.domain for passage in passages):
            kept += self._kept([i for i, p in enumerate(passages) if p.domain == domain], scores)
        return Influential(tuple(heads), tuple(scores), tuple(kept))

    def _kept(self, numbers: Sequence[int], scores: Sequence[Tensor]) -> list[Sample]:
        """The best samples of one kind of data; equal ones: the earlier."""
        known = {(i, row): x for i in numbers for row, x in enumerate(scores[i].tolist())}
        ranked = sorted((s for s, x in known.items() if x == x), key=lambda s: -known[s])
        return ranked[: max(1, round(self.keep * len(ranked)))]


def top_heads(scores: Tensor, share: float) -> tuple[tuple[int, int], ...]:
    """The share of heads (layer, head) with the highest scores (L,H), at least one, best first;
    equal ones: the earlier.
    """
    count = max(1, round(share * scores.numel()))
    order = torch.argsort(scores.flatten(), descending=True, stable=True)[:count]
    return tuple(divmod(int(i), scores.shape[1]) for i in order)


CARD = SearcherCard(
    name="sample_influence",
    build=SampleInfluence,
    finds="samples",
    papers=(
        Paper(
            "2505.07293",
            "AttentionInfluence: Adopting Attention Head Influence for Weak-to-Strong Pretraining "
            "Data Selection",
            2025,
        ),
    ),
    claim=Claim(
        "texts that repeat what they said need the heads that retrieve, and not others as much",
        "regard study repeats_need_retrieval",
    ),
)
