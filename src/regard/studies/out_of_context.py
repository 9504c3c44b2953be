r"""Out-of-context reasoning: a layer that keeps W_O and W_V apart deduces implications it never
saw, one that merges them into a single matrix does not, though both can express the same.

    logits = W_O W_V sum_t (e_EOS^T W_q^T e_t) e_t        merged: W_O W_V is one matrix, W_OV

One head without softmax reads one-hot tokens e_t (also the unembedding), at the closing EOS.
Every name lives in a city, and every city has an animal. A sequence holds noise, a name and, later,
a relation: "fact" asks for the name's city, "implication" for that city's animal. Trained on both
for some names and on facts alone for the others, whose implications are then asked. Gradient
descent on factors keeps the nuclear norm of W_O W_V small, so one direction serves city and animal;
on the merged matrix it keeps the Frobenius norm small, and entries never asked for stay zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.call import Call
from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.recurrent import Recurrent, recur
from regard.core.study import Curve, Figure, Map, Outcome, Progress, StudyCard

FACT, IMPLICATION = 0, 1
SMALL = 1e-4
"""Size of the first weights."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in this order: two relations, cities, animals, names, noise, EOS. Name i lives in city
    i mod cities; city and animal i belong together.
    """

    cities: int
    names: int
    noise: int = 5

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return 2 + 2 * self.cities + self.names + self.noise + 1

    def answer(self, names: Tensor, relation: int) -> Tensor:
        """The token that stands in this relation to each name (numbers from 0)."""
        return 2 + relation * self.cities + names % self.cities

    def sequences(self, names: Tensor, relation: int, length: int, draw: torch.Generator) -> Tensor:
        """Token ids (B,length): noise with a name somewhere, the relation later, EOS last."""
        b, first = len(names), 2 + 2 * self.cities
        tokens = torch.randint(self.noise, (b, length), generator=draw) + first + self.names
        name_at = torch.randint(length - 2, (b, 1), generator=draw)
        later = torch.rand(b, 1, generator=draw) * (length - 2 - name_at)
        tokens.scatter_(1, name_at, names[:, None] + first)
        tokens.scatter_(1, name_at + 1 + later.long(), relation)
        tokens[:, -1] = self.size - 1
        return tokens


class OneLayer(nn.Module):
    """The layer (see the file's formula). rank: of the factors; None: merged."""

    def __init__(self, size: int, rank: int | None) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.full((size, size), SMALL))
        self.output = nn.Parameter(torch.full((size, rank or size), SMALL))
        start = torch.eye(size) if rank == size else torch.ones(rank or 0, size)
        self.value = nn.Parameter(SMALL * start) if rank else None

    def circuit(self) -> Tensor:
        """W_OV (size,size)."""
        return self.output if self.value is None else self.output @ self.value

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B,size) after token ids (B,N)."""
        e = F.one_hot(tokens, len(self.query)).to(self.query.dtype)[:, None]
        asked = e[:, :, -1:] @ self.query.mT
        read = recur(asked, e, e, Call(), Recurrent(), form="parallel").output[:, 0, 0]
        read = read if self.value is None else read @ self.value.mT
        return read @ self.output.mT


class Trained(NamedTuple):
    """What training left: loss by step on what was trained and on held-out implications, accuracy
    on the latter, and W_OV.
    """

    seen: list[tuple[float, float]]
    held_out: list[tuple[float, float]]
    accuracy: float
    circuit: Tensor


def effective_rank(matrix: Tensor, share: float = 0.9) -> int:
    """The fewest singular values that hold this share of their sum."""
    values = torch.linalg.svdvals(matrix)
    return int((values.cumsum(0) < share * values.sum()).sum()) + 1


@dataclass(frozen=True)
class OutOfContext:
    """cities, names: how many; known: share of names trained on implications; rank: of the factors
    (None: full); length: of sequences; batch: a third each of facts and implications of known
    names, and facts of the others; steps, rate, decay: of AdamW.
    """

    cities: int = 20
    names: int = 80
    known: float = 0.25
    rank: int | None = None
    length: int = 16
    batch: int = 252
    steps: int = 1000
    rate: float = 5e-3
    decay: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.cities, self.batch // 3, self.steps, self.length - 2) < 1:
            raise ArgumentError("sizes", "at least 1 (length and batch 3)", self)
        if not 1 <= int(self.known * self.names) < self.names:
            raise ArgumentError("known", "a share that leaves names on both sides", self.known)

    def run(self, progress: Progress) -> Outcome:
        """Train factors and the merged matrix on the same sequences."""
        words = Vocabulary(self.cities, self.names)
        apart = self.train(words, self.rank or words.size, lambda done: progress(done / 2))
        merged = self.train(words, None, lambda done: progress((1 + done) / 2))
        lines = {
            "factors, trained on": apart.seen,
            "factors, held out": apart.held_out,
            "merged, trained on": merged.seen,
            "merged, held out": merged.held_out,
        }
        first = 2 + 2 * self.cities
        maps = tuple(
            Map(f"W_OV, {title}", "city, then animal", "name", block.tolist())
            for title, block in (
                ("factors", apart.circuit[2:first, first : first + self.names]),
                ("merged", merged.circuit[2:first, first : first + self.names]),
            )
        )
        return Outcome(self.figures(apart, merged), (Curve("Loss", "step", "nats", lines),), maps)

    def train(self, words: Vocabulary, rank: int | None, progress: Progress) -> Trained:
        """One model, measured fifty times on the way."""
        draw = torch.Generator().manual_seed(self.seed)
        model = OneLayer(words.size, rank)
        optimiser = torch.optim.AdamW(model.parameters(), lr=self.rate, weight_decay=self.decay)
        unknown = torch.arange(int(self.known * self.names), self.names)
        asked = words.sequences(unknown, IMPLICATION, self.length, draw)
        truth = words.answer(unknown, IMPLICATION)
        seen, held_out = [], []
        for step in range(self.steps):
            loss = F.cross_entropy(*self.predicted(model, words, draw))
            if step % max(1, self.steps // 50) == 0 or step == self.steps - 1:
                with torch.no_grad():
                    held_out.append((float(step), F.cross_entropy(model(asked), truth).item()))
                seen.append((float(step), loss.item()))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            progress((step + 1) / self.steps)
        with torch.no_grad():
            right = (model(asked).argmax(-1) == truth).double().mean().item()
        return Trained(seen, held_out, right, model.circuit().detach())

    def predicted(
        self, model: OneLayer, words: Vocabulary, draw: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Logits and answers of a random batch."""
        known = int(self.known * self.names)
        tokens, truth = [], []
        for low, high, relation in (
            (0, known, FACT),
            (0, known, IMPLICATION),
            (known, self.names, FACT),
        ):
            names = torch.randint(low, high, (self.batch // 3,), generator=draw)
            tokens.append(words.sequences(names, relation, self.length, draw))
            truth.append(words.answer(names, relation))
        return model(torch.cat(tokens)), torch.cat(truth)

    def figures(self, apart: Trained, merged: Trained) -> tuple[Figure, ...]:
        """Losses, accuracies and ranks."""
        blind = math.log(self.cities)
        few, many = effective_rank(apart.circuit), effective_rank(merged.circuit)
        deduced, guessed = "held-out implications are deduced", "they are guessed: loss ln cities"
        return (
            Figure("factors: loss trained on", apart.seen[-1][1], "learned", high=0.1),
            Figure("merged: loss trained on", merged.seen[-1][1], "learned", high=0.1),
            Figure("factors: held-out loss", apart.held_out[-1][1], deduced, high=blind / 2),
            Figure("merged: held-out loss", merged.held_out[-1][1], guessed, low=blind * 0.9),
            Figure("factors: held-out accuracy", apart.accuracy, deduced, low=0.5),
            Figure("merged: held-out accuracy", merged.accuracy, "chance", high=3 / self.cities),
            Figure(
                "factors: effective rank", few, "a direction per city serves both", high=self.cities
            ),
            Figure("merged: effective rank", many, "more directions than cities", low=self.cities),
        )


CARD = StudyCard(
    name="out_of_context",
    build=OutOfContext,
    papers=(
        Paper(
            "2506.10887",
            "Generalization or Hallucination? Understanding Out-of-Context Reasoning in "
            "Transformers",
            2025,
        ),
    ),
    claim=Claim(
        "with W_O and W_V trained apart, implications of names known by facts alone are deduced; "
        "with the merged matrix they are guessed",
        "regard study out_of_context",
    ),
    seconds=8,
    small={"cities": 4, "names": 16, "batch": 12, "steps": 20},
)
