r"""Multiplication: next-digit training leaves the middle digits of a product unlearned, and a loss
that makes two heads carry the running sum teaches them.

    s_k = sum_{i+j=k} a_i b_j        r_k = s_k + floor(r_{k-1} / 10)        c_k = r_k mod 10

a_i, b_j, c_k: digits of a, b and a·b, least significant first; r_k: the running sum, from which all
later digits follow. A decoder of two layers reads "a * b = c". The auxiliary loss is the mean
square of w_h . z_h + b_h - r_k / 50 for two heads h of the second layer, z_h their outputs before
the output projection at the token that predicts c_k. Middle digits need every pair of digits; ln 10
is a guess.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.study import Curve, Figure, Map, Outcome, Progress, StudyCard
from regard.studies.decoder import Decoder, Steps, train

TIMES, EQUALS, VOCAB = 10, 11, 12
UNIT = 50.0
"""What the running sum is counted in, so that it is of order one."""
TOLD = 2
"""Heads that the auxiliary loss reads."""


def digits(numbers: Tensor, count: int) -> Tensor:
    """Digits (B,count) of numbers (B,), least significant first."""
    return numbers[:, None] // 10 ** torch.arange(count) % 10


def running_sums(a: Tensor, b: Tensor) -> Tensor:
    """r (B,2n) of digits a and b (B,n); r mod 10 are the digits of the product."""
    n = a.shape[1]
    pairs = a[:, :, None] * b[:, None]
    r = torch.zeros(len(a), 2 * n, dtype=a.dtype)
    for i in range(n):
        r[:, i : i + n] += pairs[:, i]
    for k in range(1, 2 * n):
        r[:, k] += r[:, k - 1] // 10
    return r


class Batch(NamedTuple):
    """Sums: tokens (B,4n+1) that end before the last digit of c, running sums r (B,2n)."""

    tokens: Tensor
    sums: Tensor


def drawn(count: int, size: int, random: torch.Generator) -> Batch:
    """Random products of numbers with `size` digits."""
    low, high = 10 ** (size - 1), 10**size
    a, b = (digits(torch.randint(low, high, (count,), generator=random), size) for _ in range(2))
    sums = running_sums(a, b)
    times, equals = (torch.full((count, 1), sign) for sign in (TIMES, EQUALS))
    return Batch(torch.cat([a, times, b, equals, sums[:, :-1] % 10], 1), sums)


class Told(nn.Module):
    """A decoder of two layers, and readers w, b of its first heads in the second."""

    def __init__(self, size: int, dim: int, heads: int) -> None:
        super().__init__()
        self.size = size
        self.decoder = Decoder(VOCAB, 4 * size + 1, dim, layers=2, heads=heads)
        self.w = nn.Parameter(0.02 * torch.randn(TOLD, 1, dim // heads))
        self.b = nn.Parameter(torch.zeros(TOLD, 1))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B,2n,10+2) of the digits of c, and running sums (B,2,2n) read from two heads."""
        notes: dict[str, list[Any]] = {}
        asked = slice(2 * self.size + 1, None)
        logits = self.decoder(tokens, notes)[:, asked]
        z = notes["heads"][1][:, :TOLD, asked]
        return logits, ((z * self.w).sum(-1) + self.b) * UNIT


class Run(NamedTuple):
    """Loss of every digit after training, (step, losses) on the way, the mean error of the running
    sum read from the heads, and the second layer's weights in its first head, averaged.
    """

    losses: list[float]
    path: list[tuple[int, list[float]]]
    error: float
    weights: list[list[float]]


@dataclass(frozen=True)
class Multiplication:
    """size: digits of a factor; dim, heads: of the model; batch, steps, rate: of training; weight:
    of the auxiliary loss; watch: measurements on the way.
    """

    size: int = 3
    dim: int = 64
    heads: int = 4
    batch: int = 128
    steps: int = 2500
    rate: float = 2e-3
    weight: float = 10.0
    watch: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.size - 1, self.batch, self.steps, self.watch) < 1 or self.size > 9:
            raise ArgumentError("sizes", "at least 1 (digits 2 to 9)", self)
        if self.heads < TOLD or self.dim < 1 or self.dim % self.heads:
            raise ArgumentError("heads", f"2 or more, a divisor of {self.dim}", self.heads)

    def run(self, progress: Progress) -> Outcome:
        """Train without and with the auxiliary loss on the same products."""
        count = Steps(2 * self.steps, progress)
        plain, told = (self.trained(weight, count) for weight in (0.0, self.weight))
        middle = range(self.size - 1, 2 * self.size - 1)
        curves = tuple(
            Curve(
                f"Loss of each digit, {name}",
                "step",
                "nats",
                {
                    f"digit {k}": [(float(at), losses[k]) for at, losses in run.path]
                    for k in range(2 * self.size)
                },
            )
            for name, run in (("without", plain), ("with the auxiliary loss", told))
        )
        maps = tuple(
            Map(f"First head of the second layer, {name}", "query", "key", run.weights)
            for name, run in (("without", plain), ("with the auxiliary loss", told))
        )
        return Outcome(figures(plain, told, middle), curves, maps)

    def trained(self, weight: float, count: Steps) -> Run:
        """One model, measured on held-out products."""
        random, other = (torch.Generator().manual_seed(2 * self.seed + part) for part in (0, 1))
        test = drawn(1000, self.size, other)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = Told(self.size, self.dim, self.heads)

        def loss() -> Tensor:
            batch = drawn(self.batch, self.size, random)
            logits, read = model(batch.tokens)
            right = F.cross_entropy(logits.flatten(0, 1), (batch.sums % 10).flatten())
            return right + weight * ((read - batch.sums[:, None]) / UNIT).square().mean()

        path = [(0, measured(model, test)[0])]
        for step in train(model, loss, self.steps, self.rate, count):
            if step % max(1, self.steps // self.watch) == 0 or step == self.steps:
                path.append((step, measured(model, test)[0]))
        losses, error = measured(model, test)
        shown = model.decoder.looks(test.tokens)[1].weights[:, 0].mean(0)
        return Run(losses, path, error, shown.tolist())


@torch.no_grad()
def measured(model: Told, test: Batch) -> tuple[list[float], float]:
    """Loss of each digit, and the mean error of the running sums that the heads carry."""
    logits, read = model(test.tokens)
    losses = F.cross_entropy(logits.mT, test.sums % 10, reduction="none").mean(0)
    return losses.tolist(), (read - test.sums[:, None]).abs().mean().item()


def figures(plain: Run, told: Run, middle: range) -> tuple[Figure, ...]:
    """Of easy digits, middle digits and running sums."""
    guess, last = math.log(10), middle[-1]
    stuck = "a guess, ln 10 = 2.30 (four digits: 2.30, 2.30, 2.22 in the end)"
    return (
        Figure("without: loss of the first digit", plain.losses[0], "learned: 0.00", high=0.1),
        Figure("without: loss of the last digit", plain.losses[-1], "learned: 0.00", high=0.2),
        Figure(
            "without: largest loss of a middle digit",
            max(plain.losses[k] for k in middle),
            stuck,
            low=0.95 * guess,
        ),
        Figure(f"without: loss of digit {last}", plain.losses[last], stuck, low=0.85 * guess),
        Figure(
            f"with the auxiliary loss: loss of digit {last}",
            told.losses[last],
            "learned: it falls first (0.05 in a wider model)",
            high=0.75 * guess,
        ),
        Figure(
            "with: error of the running sum read from two heads",
            told.error,
            "near 1, as with implicit chains of thought (0.6 to 2.0, against 28 to 113 without)",
            high=4.0,
        ),
    )


CARD = StudyCard(
    name="multiplication",
    build=Multiplication,
    papers=(
        Paper(
            "2510.00184",
            "Why Can't Transformers Learn Multiplication? Reverse-Engineering Reveals Long-Range "
            "Dependency Pitfalls",
            2025,
        ),
    ),
    claim=Claim(
        "a middle digit of a product stays a guess, until two heads must carry the running sum",
        "regard study multiplication",
    ),
    seconds=140,
    small={"size": 2, "dim": 16, "batch": 8, "steps": 12, "watch": 3},
)
