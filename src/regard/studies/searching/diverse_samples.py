r"""Diverse samples: a bandit over clusters finds, with few gradients, training texts that help;
those of the highest influence alone help one kind of text and harm another.

    chosen by      the bandit      chance      the highest influence of all      (as many of each)
    then           tuning on what is chosen, and the loss on new texts of the reference's kinds

Texts of five kinds, one as the model knows it and four rewritten (capitals, letters moved by 13,
backwards, letters as digits), are clustered by the model's own states; the reference is of two
kinds. Differs from the paper: a pocket model is tuned, none is trained from nothing, and the
constants are chosen for this size, since the paper's are not known.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.core.card import Claim
from regard.core.errors import ArgumentError
from regard.core.passage import Passage
from regard.core.scene import Scene
from regard.core.study import Curve, Figure, Outcome, Progress, StudyCard
from regard.recipes.tuning import tuned
from regard.searchers.bandit import clustered
from regard.searchers.diverse_influence import CARD as SEARCHER
from regard.searchers.diverse_influence import DiverseInfluence
from regard.searchers.judging import judged
from regard.searchers.kronecker_influence import KroneckerInfluence
from regard.studies.searching.needles import pocket
from regard.tasks.text import Text

KINDS = ("plain", "capitals", "moved", "backwards", "digits")
REFERENCE = ("capitals", "backwards")
BATCH, RATE = 8, 3e-4  # of tuning


@dataclass(frozen=True)
class DiverseSamples:
    """each: texts of a kind to choose from, of `length` tokens; count: texts chosen; clusters,
    alpha, threshold: of the search; known: texts of a kind in the reference; exam: in the test;
    steps: of tuning; chances: random choices.
    """

    each: int = 48
    count: int = 32
    length: int = 96
    clusters: int = 8
    alpha: float = 0.3
    threshold: float = 0.1
    known: int = 8
    exam: int = 24
    steps: int = 24
    chances: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.count <= len(KINDS) * self.each or self.chances < 1:
            got = (self.count, self.chances)
            raise ArgumentError("count, chances", "at most all texts; at least 1", got)

    def run(self, progress: Progress) -> Outcome:
        """Choose in three ways, tune a model on each choice, and test it."""
        model = pocket()
        texts = torch.cat([self.texts(kind, self.each, 0) for kind in KINDS])
        scene = Scene.of(model, [shown(self.texts(kind, self.known, 1)) for kind in REFERENCE])
        samples = [shown(text[None]) for text in texts]
        search = DiverseInfluence(
            self.count, batch=2, threshold=self.threshold, alpha=self.alpha, seed=self.seed
        )
        clusters = clustered(embedded(model, texts), self.clusters, seed=self.seed).tolist()
        found = search.run(scene, samples, clusters, lambda share, _: progress(0.2 * share))
        influence = KroneckerInfluence(scene, search.damping)
        every = np.array([influence.of(sample) for sample in samples])
        progress(0.4)
        random = np.random.default_rng(self.seed)
        drawn = [random.permutation(len(texts))[: self.count] for _ in range(self.chances)]
        exam = [shown(self.texts(kind, self.exam, 2)) for kind in REFERENCE]
        losses = [[-judged(model, [one], "loss") for one in exam]]
        for choice in (found.kept, np.argsort(-every, kind="stable")[: self.count], *drawn):
            student = copy.deepcopy(model)
            tuned(student, self.batches(texts, list(choice)), self.steps, rate=RATE)
            losses.append([-judged(student, [one], "loss") for one in exam])
            progress(0.4 + 0.6 * (len(losses) - 1) / (2 + self.chances))
        return self.outcome(np.array(losses), len(found.influence) / len(texts))

    def texts(self, kind: str, count: int, part: int) -> Tensor:
        """Texts (count, length) of a kind, others in each part."""
        number = (3 * self.seed + part) * len(KINDS) + KINDS.index(kind)
        return rewritten(next(Text(self.length).batches("train", count, number)).inputs, kind)

    def batches(self, texts: Tensor, choice: Sequence[int]) -> Iterator[Mapping[str, Tensor]]:
        """What is chosen, again and again."""
        source = torch.Generator().manual_seed(self.seed)
        while True:
            yield {
                "input_ids": texts[choice][torch.randint(len(choice), (BATCH,), generator=source)]
            }

    def outcome(self, losses: np.ndarray, asked: float) -> Outcome:
        """Of losses (way, kind): untuned, by the bandit, by influence alone, by chance."""
        falls = losses[0] - losses[1:]
        bandit, highest, chance = falls[0], falls[1], falls[2:].mean(0)
        better, both = "lower loss than by chance", "diversity and influence, not influence alone"
        figures = (
            Figure("texts whose gradient is computed", asked, "few of all", high=0.5),
            Figure(
                "fall of the loss, of that by chance",
                float(bandit.mean() / chance.mean()),
                better,
                low=1.0,
            ),
            Figure(
                "fall of the loss, more than by influence",
                float((bandit - highest).mean()),
                both,
                low=0.0,
            ),
            Figure(
                "least fall of a kind, more", float(bandit.min() - highest.min()), both, low=0.0
            ),
        )
        ways = {"bandit": bandit, "highest influence": highest, "chance": chance}
        lines = {name: [(float(i), float(x)) for i, x in enumerate(f)] for name, f in ways.items()}
        title = f"Fall of the loss on {' and '.join(REFERENCE)} text"
        return Outcome(figures, (Curve(title, "kind", "nats", lines),))


def rewritten(ids: Tensor, kind: str) -> Tensor:
    """Bytes of text (B,N) after the token that begins them, in another kind of writing."""
    small = (ids >= ord("a")) & (ids <= ord("z"))
    letter = ids - ord("a")
    if kind == "backwards":
        return torch.cat([ids[:, :1], ids[:, 1:].flip(1)], 1)
    new = {
        "plain": ids,
        "capitals": letter + ord("A"),
        "moved": (letter + 13) % 26 + ord("a"),
        "digits": letter % 10 + ord("0"),
    }
    return torch.where(small, new[kind], ids)


def shown(ids: Tensor) -> Passage:
    """Texts (B,N) as a passage, all of it scored."""
    return Passage({"input_ids": ids}, ids)


@torch.no_grad()
def embedded(model: Any, texts: Tensor) -> Tensor:
    """Embeddings (B,C) of texts (B,N): the mean of the last block's inputs, about their centre."""
    states = model(texts, output_hidden_states=True).hidden_states[-2].mean(1)
    return states - states.mean(0)


CARD = StudyCard(
    name="diverse_samples",
    build=DiverseSamples,
    papers=SEARCHER.papers,
    claim=Claim(
        "few samples need a backward pass to find texts that help more than chance, and more kinds "
        "of text than the highest influence alone",
        "regard study diverse_samples",
    ),
    seconds=30,
    small={
        "each": 4,
        "count": 4,
        "length": 32,
        "clusters": 3,
        "known": 2,
        "exam": 2,
        "steps": 1,
        "chances": 1,
    },
)
