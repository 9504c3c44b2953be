r"""Softmax regression in context: a softmax attention layer that is shown a task answers much like
one gradient step on it.

    L(x) = |f(x) - b|^2 / 2        f(x) = softmax(A x)        A: (n,d), a row per token  b: (n,)
    x' = -eta grad L(0)

The layer reads tokens (a_i, n b_i), is asked (a_i, 0) for every i, and its n answers go through a
softmax; it is trained on L over fresh tasks, and eta is fitted to tasks. To move x to x', or A to
A', is to regress on b~ = b + f - f' from where one stands: a shift of at most |A|/2 per |x' - x|
and |x|/2 per |A' - A|, in spectral norms, where the paper proves exp(O(R^2 + log n)).

Differs from the paper: it does not say how tasks are drawn; here A is Gaussian and b = softmax(A w)
with w ~ N(0, I). Some layers, and more with a larger A, find another way to predict as well: the
question finds its own row, so that slopes differ from the step's although predictions do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.study import Curve, Figure, Map, Outcome, Progress, StudyCard
from regard.layers.attention import Attention
from regard.studies.in_context import answers, fit, reader
from regard.studies.softmax_tasks import Tasks, predicted

MEASURES = ("objective", "distance of predictions", "cosine of predictions", "cosine of slopes")
"""What a layer is compared in."""
LOOKS = 20
"""How often that happens during training."""


def asked(layer: Attention, tasks: Tasks, questions: Tensor) -> Tensor:
    """The layer's answers (B,n) to questions (B,n,d), before the softmax."""
    return answers(layer, tasks.a, tasks.b * tasks.b.shape[-1], questions)


def compared(layer: Attention, tasks: Tasks, rate: float) -> Tensor:
    """Layer against step, in the order of MEASURES, means over tasks. Predictions are compared less
    1/n; slopes are their derivatives by the question.
    """
    questions = tasks.a.clone().requires_grad_()
    logits = asked(layer, tasks, questions)
    slopes = torch.autograd.grad(logits.sum(), questions)[0]
    x, f = tasks.step(rate), logits.detach().softmax(-1)
    wanted, even = predicted(tasks.a, x), 1 / f.shape[-1]
    own = ((f * (1 - f))[..., None] * slopes).flatten(1)
    steps = ((wanted * (1 - wanted))[..., None] * x[:, None]).flatten(1)
    found = (
        (f - tasks.b).square().sum(-1) / 2,
        (f - wanted).norm(dim=-1),
        F.cosine_similarity(f - even, wanted - even, dim=-1),
        F.cosine_similarity(own, steps, dim=-1),
    )
    return torch.stack([values.mean() for values in found])


@dataclass(frozen=True)
class SoftmaxRegression:
    """Train layers and follow how near they come to the step; figures are means over layers.

    Args:
        n, dim, size: rows and columns of A, and its standard deviation. layers: how many. batch,
            steps, rate: of Adam. tests: tasks to fit eta on, and as many to judge by. seed: of
            weights and tasks.
    """

    n: int = 25
    dim: int = 20
    size: float = 0.25
    layers: int = 5
    batch: int = 64
    steps: int = 2000
    rate: float = 0.005
    tests: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.dim, self.layers, self.batch, self.steps, self.tests) < 1 or self.n < 2:
            raise ArgumentError("sizes", "at least 1, and n at least 2", self)
        if self.size <= 0:
            raise ArgumentError("size", "above 0", self.size)

    def run(self, progress: Progress) -> Outcome:
        draw = torch.Generator().manual_seed(self.seed)
        eta = self._tasks(self.tests, draw).fitted_rate()
        test = self._tasks(self.tests, draw)
        trained = [reader(self.dim, 1, self.seed * self.layers + i) for i in range(self.layers)]
        paths = []
        for i, layer in enumerate(trained):
            part = partial(_part, progress, i, self.layers)
            paths.append(self._train(layer, lambda found: compared(found, test, eta), draw, part))
        looks = torch.stack(paths)
        with torch.no_grad():
            x = test.step(eta)
            stepped = float(test.objective(predicted(test.a, x)))
            idle = float(test.objective(torch.full_like(test.b, 1 / self.n)))
            figures = closeness(looks.mean(0), stepped, idle)
            return Outcome(
                (*figures, *moves(trained[0], test, x)),
                curves(looks, marks(self.steps), stepped),
                (picture(trained[0], test, x),),
            )

    def _train(
        self,
        layer: Attention,
        look: Callable[[Attention], Tensor],
        draw: torch.Generator,
        progress: Progress,
    ) -> Tensor:
        """Looks (points, measures) at the steps of `marks`."""
        looks, recorded = [look(layer)], marks(self.steps)

        def loss() -> Tensor:
            tasks = self._tasks(self.batch, draw)
            return tasks.objective(asked(layer, tasks, tasks.a).softmax(-1))

        def watch(share: float) -> None:
            if round(share * self.steps) in recorded:
                looks.append(look(layer))
            progress(share)

        fit(layer, loss, self.steps, self.rate, watch)
        return torch.stack(looks)

    def _tasks(self, count: int, draw: torch.Generator) -> Tasks:
        return Tasks.drawn(count, self.n, self.dim, self.size, draw)


def _part(progress: Progress, index: int, count: int, share: float) -> None:
    progress((index + share) / count)


def marks(steps: int) -> list[int]:
    """Steps to look at: the start, the end, and evenly between."""
    return sorted({steps * part // LOOKS for part in range(LOOKS + 1)})


def closeness(looks: Tensor, stepped: float, idle: float) -> tuple[Figure, ...]:
    """Figures from looks (points, measures); the step's objective is `stepped`, none's `idle`."""
    objective, distance, predictions, slopes = looks[-1].tolist()
    fell = distance / float(looks[0, 1])
    return (
        Figure("objective, step/none", stepped / idle, "below 1: a step helps", high=0.5),
        Figure("objective, layer/step", objective / stepped, "comparable: about 1", 0.5, 1.5),
        Figure(MEASURES[2], predictions, "great similarity: near 1", low=0.85),
        Figure(MEASURES[3], slopes, "similarity: towards 1", low=0.5),
        Figure("distance, end/start", fell, "falls with training", high=0.5),
    )


def moves(layer: Attention, tasks: Tasks, x: Tensor) -> tuple[Figure, ...]:
    """How far the target shifts when x goes from zero to x (B,d), and when the layer's other
    outputs are added to A, in units of the bound.
    """
    a, zero = tasks.a, torch.zeros_like(x)
    examples = torch.cat([a, tasks.b[..., None] * a.shape[1]], -1)
    moved = a + layer(F.pad(a, (0, 1)), context=examples)[..., :-1]
    by_x = (predicted(a, x) - predicted(a, zero)).norm(dim=-1)
    by_a = (predicted(moved, x) - predicted(a, x)).norm(dim=-1)
    size, change = (torch.linalg.matrix_norm(m, 2) for m in (a, moved - a))
    length, bounded = x.norm(dim=-1), "bounded: at most 1"
    return (
        Figure("shift by x", float((2 * by_x / (size * length)).max()), bounded, high=1.0),
        Figure("shift by A", float((2 * by_a / (length * change)).max()), bounded, high=1.0),
    )


def curves(looks: Tensor, at: list[int], stepped: float) -> tuple[Curve, ...]:
    """Each measure along training, layer by layer, of looks (layers, points, measures)."""
    lines = [
        {
            f"layer {i + 1}": list(zip(at, path[:, which].tolist(), strict=True))
            for i, path in enumerate(looks)
        }
        for which in range(len(MEASURES))
    ]
    lines[0]["one gradient step"] = [(at[0], stepped), (at[-1], stepped)]
    return tuple(
        Curve(name.capitalize(), "training step", name, drawn)
        for name, drawn in zip(MEASURES, lines, strict=True)
    )


def picture(layer: Attention, tasks: Tasks, x: Tensor) -> Map:
    """The first task: its labels, and what the layer and the step make of them."""
    said = asked(layer, tasks, tasks.a)[0].softmax(-1)
    rows = [tasks.b[0].tolist(), said.tolist(), predicted(tasks.a, x)[0].tolist()]
    return Map("One task: labels, layer, step", "what", "token", rows)


CARD = StudyCard(
    name="softmax_regression",
    build=SoftmaxRegression,
    papers=(
        Paper(
            "2304.13276",
            "The Closeness of In-Context Learning and Weight Shifting for Softmax Regression",
            2023,
        ),
    ),
    claim=Claim(
        "a trained softmax attention layer predicts much as one gradient step on softmax "
        "regression does",
        "regard study softmax_regression",
    ),
    seconds=25,
    small={"n": 6, "dim": 3, "batch": 4, "steps": 4, "layers": 2, "tests": 8},
)
