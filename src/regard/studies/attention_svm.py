r"""Attention as a support vector machine: descent turns the query–key matrix towards the one of
least norm that separates the token it selects from the others.

    f = sum_t softmax_t(z^T W x_t) v.x_t        loss: mean log(1 + exp(-y f))

x_t, z, v: (d,), y = ±1, v fixed, no 1/sqrt(d); the gradient of each matrix is divided by its
length. Trained as one matrix W, the norm is Frobenius'; as W = Q^T K, under a vanishing penalty on
both, it is the nuclear norm. A machine is local if it separates the tokens that the softmax
selected, global if it separates those of the best y v.x.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.call import Call
from regard.core.card import Claim, Golden, Paper
from regard.core.errors import ArgumentError
from regard.core.study import Curve, Figure, Map, Outcome, Progress, StudyCard
from regard.operators.softmax import softmax
from regard.studies.max_margin import constraints, least_norm, margins

EPS = torch.finfo(torch.float64).eps
NUCLEAR = 10.0
"""Weight of the nuclear norm in its machine."""
POINTS = 40
"""Points of a curve."""


@dataclass(frozen=True, eq=False)
class Problems:
    """P problems of n sequences: tokens x (P,n,T,d), queries z (P,n,d), head v (P,d), labels y
    (P,n).
    """

    x: Tensor
    z: Tensor
    v: Tensor
    y: Tensor

    @staticmethod
    def drawn(shape: tuple[int, int, int, int], draw: torch.Generator) -> Problems:
        """Directions uniform on the sphere and labels by fair coins, shape (P,n,T,d), float64."""
        p, n, _, d = shape

        def sphere(*sizes: int) -> Tensor:
            return F.normalize(torch.randn(*sizes, generator=draw, dtype=torch.float64), dim=-1)

        y = torch.randint(2, (p, n), generator=draw).double() * 2 - 1
        return Problems(sphere(*shape), sphere(p, n, d), sphere(p, d), y)

    def best(self) -> Tensor:
        """The token of the largest y v.x of each sequence (P,n)."""
        return (self.y[..., None] * torch.einsum("pntd,pd->pnt", self.x, self.v)).argmax(-1)


def product(weights: Sequence[Tensor]) -> Tensor:
    """W (P,d,d): the only weight, or Q^T K of two (P,m,d)."""
    return weights[0] if len(weights) == 1 else weights[0].mT @ weights[1]


def outputs(problems: Problems, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """f (P,n), the loss of each problem (P,) and the attention (P,n,T)."""
    x = problems.x
    queries = (problems.z @ product(weights))[:, :, None]
    each = torch.eye(x.shape[2], dtype=x.dtype).expand(*x.shape[:2], -1, -1)
    seen = softmax(queries, x, each, Call(scale=1.0)).output[:, :, 0]
    f = torch.einsum("pnt,pntd,pd->pn", seen, x, problems.v)
    return f, F.softplus(-problems.y * f).mean(-1), seen


def marks(steps: int) -> range:
    """Steps to draw, counted from 1: evenly apart, the last one among them."""
    apart = max(1, steps // POINTS)
    return range((steps - 1) % apart + 1, steps + 1, apart)


def descend(problems: Problems, weights: Sequence[Tensor], steps: int, rate: float) -> Tensor:
    """Normalised descent: the products W after the steps of `marks` (points,P,d,d)."""
    path, recorded = [], marks(steps)
    for step in range(steps):
        weights = [w.detach().requires_grad_() for w in weights]
        loss = outputs(problems, weights)[1].sum()
        if len(weights) > 1:
            loss = loss + EPS * torch.stack([w.square().sum() for w in weights]).sum()
        grads = torch.autograd.grad(loss, weights)
        sizes = [g.norm(dim=(1, 2), keepdim=True) + EPS for g in grads]
        weights = [w - rate * g / s for w, g, s in zip(weights, grads, sizes, strict=True)]
        if step + 1 in recorded:
            path.append(product(weights).detach())
    return torch.stack(path)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Cosine between matrices (…,d,d)."""
    return F.cosine_similarity(a.flatten(-2), b.flatten(-2), dim=-1)


@dataclass(frozen=True, eq=False)
class Judged:
    """One way of training beside its machines. path (points,P,d,d); seen: attention at the end
    (P,n,T); frobenius, nuclear: local machines, and best: the global one (P,d,d); there: problems
    for which all three exist (P,).
    """

    path: Tensor
    seen: Tensor
    frobenius: Tensor
    nuclear: Tensor
    best: Tensor
    there: Tensor

    @staticmethod
    def of(problems: Problems, path: Tensor) -> Judged:
        """Solve the machines for the tokens selected at the path's end."""
        seen = outputs(problems, [path[-1]])[2]
        local = constraints(problems.x, problems.z, seen.argmax(-1))
        overall = constraints(problems.x, problems.z, problems.best())
        frobenius, nuclear, best = (
            least_norm(local),
            least_norm(local, NUCLEAR),
            least_norm(overall),
        )
        kept = [margins(local, frobenius), margins(local, nuclear), margins(overall, best)]
        there = torch.stack([m.amin(-1) > 0.999 for m in kept]).all(0)
        if not there.any():
            raise ArgumentError("dim", "wide enough to separate the tokens", problems.x.shape[-1])
        return Judged(path, seen, frobenius, nuclear, best, there)

    def agreement(self, machine: Tensor) -> list[float]:
        """Mean correlation of the path with a machine, point by point."""
        return correlation(self.path, machine)[:, self.there].mean(-1).tolist()


@dataclass(frozen=True)
class AttentionSvm:
    """Train W, and Q and K, on the same problems and hold both against support vector machines.

    Args:
        problems: how many. sequences, tokens, dim: n, T and d. steps, rate: of descent. seed: of
            the problems and of Q and K.
    """

    problems: int = 20
    sequences: int = 6
    tokens: int = 8
    dim: int = 10
    steps: int = 1000
    rate: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.problems, self.sequences, self.dim, self.steps) < 1 or self.tokens < 2:
            raise ArgumentError("sizes", "at least 1, and 2 tokens", self)

    def run(self, progress: Progress) -> Outcome:
        draw = torch.Generator().manual_seed(self.seed)
        problems = Problems.drawn((self.problems, self.sequences, self.tokens, self.dim), draw)
        size = self.problems, self.dim, self.dim
        zero = torch.zeros(size, dtype=torch.float64)
        pair = [
            (2 * torch.rand(size, generator=draw).double() - 1) / self.dim**0.5 for _ in range(2)
        ]
        whole = descend(problems, [zero], self.steps, self.rate)
        progress(0.25)
        factored = descend(problems, pair, self.steps, self.rate)
        progress(0.5)
        one = Judged.of(problems, whole)
        progress(0.75)
        two = Judged.of(problems, factored)
        progress(1.0)
        sizes = [
            torch.linalg.matrix_rank(w, rtol=1e-6).double() for w in (one.nuclear, one.frobenius)
        ]
        rank = float((sizes[0] / sizes[1])[one.there].mean())
        picture = Map("Attention of the first problem", "sequence", "token", one.seen[0].tolist())
        return Outcome(figures(one, two, rank), curves(one, two, self.steps), (picture,))


def figures(one: Judged, two: Judged, rank: float) -> tuple[Figure, ...]:
    """Where training as one matrix and as two factors has come."""
    own, other, overall = (one.agreement(m)[-1] for m in (one.frobenius, one.nuclear, one.best))
    nuclear, frobenius = (two.agreement(m)[-1] for m in (two.nuclear, two.frobenius))
    mass = float(one.seen.amax(-1).mean())
    return (
        Figure("W with its machine", own, "the local Frobenius machine: near 1", low=0.95),
        Figure("W: local less global", own - overall, "selection may be local: above 0", low=0.0),
        Figure("W: Frobenius less nuclear", own - other, "another bias than (K,Q)'s", low=0.0),
        Figure("(K,Q) with its machine", nuclear, "the local nuclear machine: near 1", low=0.9),
        Figure("(K,Q): nuclear less Frobenius", nuclear - frobenius, "above 0", low=0.0),
        Figure("mass on the selected token", mass, "attention saturates: 1", low=0.99),
        Figure("rank, nuclear/Frobenius", rank, "the nuclear machine's rank is lower", high=0.9),
    )


def curves(one: Judged, two: Judged, steps: int) -> tuple[Curve, ...]:
    """Correlations along both paths."""
    lines = {
        "W, Frobenius": one.agreement(one.frobenius),
        "W, nuclear": one.agreement(one.nuclear),
        "(K,Q), Frobenius": two.agreement(two.frobenius),
        "(K,Q), nuclear": two.agreement(two.nuclear),
    }
    at = marks(steps)
    drawn = {name: list(zip(at, line, strict=True)) for name, line in lines.items()}
    return (Curve("Correlation with support vector machines", "step", "correlation", drawn),)


def replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' outputs and gradients, trained as W and as query and key."""
    found: dict[str, Tensor] = {}
    for run in range(2):
        weights = {k: w.clone().requires_grad_() for k, w in case["state_dict"][f"sd{run}"].items()}
        x, z, y = (case["inputs"][f"{name}{run}"][None] for name in "XZY")
        own = [w[None] for name, w in weights.items() if name != "v"]
        f, loss, seen = outputs(Problems(x, z, weights["v"][None], y), own)
        grads = torch.autograd.grad(loss[0], list(weights.values()))
        found |= {f"out{run}": f[0], f"loss{run}": loss[0], f"softmax{run}": seen[0, :, None]}
        found |= {f"g_{name}_{run}": g for name, g in zip(weights, grads, strict=True)}
    return found


CARD = StudyCard(
    name="attention_svm",
    build=AttentionSvm,
    papers=(Paper("2308.16898", "Transformers as Support Vector Machines", 2023),),
    claim=Claim(
        "trained attention points where a support vector machine over token pairs does",
        "regard study attention_svm",
    ),
    seconds=5,
    small={"problems": 2, "sequences": 3, "tokens": 4, "dim": 6, "steps": 30},
    goldens=(
        Golden(
            "144_tsvm_attention.pt", replay, "https://github.com/umich-sota/TF-as-SVM", "568305a"
        ),
    ),
)
