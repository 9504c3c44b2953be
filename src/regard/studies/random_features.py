r"""Random-feature attention: heads with frozen random query–key matrices learn averages over the
keys through their values alone, from as many samples however many keys there are.

    f(x_0, x) = sum_m v_m . phi_m        phi_m = 1/N sum_i relu(x_0^T W_m x_i) x_i

x_0: one query, x: (N,d) keys, all of length one with a constant 1 appended; W_m: (d+1,d+1), m of M
heads, Gaussian around zero or (biased) around c times the identity on the d true coordinates. The
v_m are fitted by ridge regression, its strength chosen on a fifth of the samples. Against them: as
many random ReLU features of all the inputs side by side. The targets are, with b a fixed direction,
1/N sum_i (x_0.x_i)^p (b.x_i), p = 0, 1, 2; errors are mean squares over the target's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.call import Call
from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.scored import attend
from regard.core.study import Curve, Figure, Outcome, Progress, StudyCard
from regard.core.weights import Scored
from regard.operators.relu import ReluWeights

POWERS = {"the keys alone": 0, "one product": 1, "a squared product": 2}
"""Name of a target -> p."""
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths tried, in units of a sample's mean square."""


def attention_features(query: Tensor, keys: Tensor, w: Tensor) -> Tensor:
    """phi of queries (B,d) and keys (B,N,d) under w (M,d,d), side by side: (B,M*d)."""
    q = torch.einsum("bd,mde->bme", query, w)[:, :, None]
    k = keys[:, None]
    method = Scored(normalise=ReluWeights(), scale=1.0)
    return attend(q, k, k, Call(), method).output.flatten(1)


def network_features(query: Tensor, keys: Tensor, w: Tensor) -> Tensor:
    """ReLU features of a query (B,d) and its keys (B,N,d) side by side, w (features,(N+1)*d)."""
    return (torch.cat([query[:, None], keys], 1).flatten(1) @ w.mT).relu()


def ridge(features: Tensor, y: Tensor, strength: float) -> Tensor:
    """Coefficients (F,) that fit y (n,) from features (n,F), the square norm penalised."""
    gram = features @ features.mT
    ridged = gram + strength * gram.diagonal().mean() * torch.eye(len(y), dtype=y.dtype)
    return features.mT @ torch.linalg.solve(ridged, y)


def relative_error(features: Tensor, y: Tensor, samples: int) -> float:
    """Error on what follows the first `samples` rows, fitted on these."""
    fit = samples - samples // 5

    def error(strength: float, start: int, stop: int) -> float:
        guess = features[start:stop] @ ridge(features[:start], y[:start], strength)
        return ((guess - y[start:stop]).square().sum() / y[start:stop].square().sum()).item()

    best = min(RIDGES, key=lambda strength: error(strength, fit, samples))
    return error(best, samples, len(y))


@dataclass(frozen=True)
class Sample:
    """Queries (B,d), keys (B,N,d), both with the constant, and the direction b (d,)."""

    query: Tensor
    keys: Tensor
    direction: Tensor

    def target(self, power: int) -> Tensor:
        """1/N sum_i (x_0.x_i)^power (b.x_i), (B,)."""
        x0, x = self.query[:, :-1], self.keys[..., :-1]
        products = torch.einsum("bd,bnd->bn", x0, x)
        return (products**power * (x @ self.direction)).mean(1)


@dataclass(frozen=True)
class RandomFeatures:
    """dim: d; keys: N, and four times as many; heads: M; samples: to fit on; tests: to judge by;
    bias: c.
    """

    dim: int = 6
    keys: int = 6
    heads: int = 200
    samples: int = 1500
    tests: int = 500
    bias: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.dim, self.keys, self.heads, self.tests) < 1 or self.samples < 5:
            raise ArgumentError("sizes", "at least 1, and 5 samples", self)

    def run(self, progress: Progress) -> Outcome:
        """Fit each target with each kind of feature, then the first with more keys."""
        draw = torch.Generator().manual_seed(self.seed)
        few = self.errors(self.keys, draw, tuple(POWERS), lambda done: progress(done * 0.4))
        counts = (2 * self.keys, 4 * self.keys)
        simple = tuple(POWERS)[:1]
        many = []
        for step, n in enumerate(counts):
            many.append(self.errors(n, draw, simple, lambda _: None))
            progress(0.4 + 0.6 * (step + 1) / len(counts))
        by_keys = {
            kind: [
                (float(n), table[kind, simple[0]])
                for n, table in zip((self.keys, *counts), (few, *many), strict=True)
            ]
            for kind in ("attention", "network")
        }
        by_target = {
            kind: [(float(p), few[kind, name]) for name, p in POWERS.items()]
            for kind in ("attention", "biased attention", "network")
        }
        return Outcome(
            figures(few, {kind: line[-1][1] / line[0][1] for kind, line in by_keys.items()}),
            (
                Curve("Error by target", "power of x_0.x_i", "relative test error", by_target),
                Curve("Error by keys, p = 0", "keys", "relative test error", by_keys),
            ),
        )

    def errors(
        self, keys: int, draw: torch.Generator, names: tuple[str, ...], progress: Progress
    ) -> dict[tuple[str, str], float]:
        """(kind of features, target) -> relative test error."""
        sample, width = self.sample(keys, draw), self.dim + 1
        w = torch.randn(self.heads, width, width, generator=draw, dtype=torch.float64)
        true = F.pad(torch.eye(self.dim, dtype=w.dtype), (0, 1, 0, 1))
        flat = torch.randn(self.heads * width, (keys + 1) * width, generator=draw, dtype=w.dtype)
        kinds: dict[str, Callable[[], Tensor]] = {
            "attention": lambda: attention_features(sample.query, sample.keys, w),
            "biased attention": lambda: attention_features(
                sample.query, sample.keys, w + self.bias * true
            ),
            "network": lambda: network_features(sample.query, sample.keys, flat),
        }
        table = {}
        for kind, features in kinds.items():
            made = features()
            for name in names:
                table[kind, name] = relative_error(made, sample.target(POWERS[name]), self.samples)
            progress(len(table) / (len(kinds) * len(names)))
        return table

    def sample(self, keys: int, draw: torch.Generator) -> Sample:
        """Inputs uniform on the sphere, those to fit on first."""
        total = self.samples + self.tests

        def sphere(*shape: int) -> Tensor:
            return F.normalize(torch.randn(*shape, generator=draw, dtype=torch.float64), dim=-1)

        query, x = sphere(total, self.dim), sphere(total, keys, self.dim)
        return Sample(
            F.pad(query, (0, 1), value=1.0), F.pad(x, (0, 1), value=1.0), sphere(self.dim)
        )


def figures(table: dict[tuple[str, str], float], growth: dict[str, float]) -> tuple[Figure, ...]:
    """Errors and their ratios; growth: of the error with four times the keys."""
    flat, product, square = POWERS
    best = {name: min(table["attention", name], table["biased attention", name]) for name in POWERS}
    lower = "attention needs fewer samples than a two-layer network of random features"
    return (
        Figure(f"error on {flat}", best[flat], "an average over keys is learned", high=0.05),
        Figure(f"error on {product}", best[product], "so is one with the query", high=0.2),
        *(
            Figure(f"network / attention, {name}", table["network", name] / best[name], lower, 1.2)
            for name in POWERS
        ),
        Figure(
            f"zero-mean / biased attention, {square}",
            table["attention", square] / table["biased attention", square],
            "matrices with a mean need fewer samples for functions of x_0.x_i",
            low=1.0,
        ),
        Figure(
            "attention: error with 4 times the keys",
            growth["attention"],
            "the sample size does not depend on the number of keys",
            high=2.0,
        ),
        Figure(
            "network: error with 4 times the keys",
            growth["network"],
            "the network's sample size grows with the number of keys",
            low=2.0,
        ),
    )


CARD = StudyCard(
    name="random_features",
    build=RandomFeatures,
    papers=(
        Paper(
            "2307.11353",
            "What can a Single Attention Layer Learn? A Study Through the Random Features Lens",
            2023,
        ),
    ),
    claim=Claim(
        "an attention layer with random heads learns averages over keys from fewer samples than a "
        "two-layer network, whatever the number of keys",
        "regard study random_features",
    ),
    seconds=15,
    small={"heads": 10, "samples": 60, "tests": 40},
)
