r"""Bigram–Backcopy: a softmax head that has nothing to copy parks on the first token and drains its
value; a ReLU head, whose rows may be empty, does not.

    x_t = x_{t-2} if x_{t-1} is a trigger, else x_t ~ P(x_{t-1}, .)

x_0 begins every sequence, and x_1 is no trigger. Rows of P come from a Dirichlet distribution; the
triggers are the tokens that a walk along P meets most. P can be learned without attention, which is
needed after triggers alone: there it must look one token back. A small decoder is trained with
softmax, with ReLU, and with softmax in three layers, whose first token also grows in the residual
stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.study import Curve, Figure, Map, Outcome, Progress, StudyCard
from regard.studies.backcopy_chain import Chain, prediction_loss
from regard.studies.decoder import Decoder, Look, Steps, train


class Reading(NamedTuple):
    """Of the first layer: mean weight on the first token (of other queries and of triggers) and, of
    triggers, on the token before; norms of the first value and of the others. Of all layers:
    residual norm of the first token over that of the others. Losses in nats: of answers to
    triggers, and of P beyond what knowing P leaves.
    """

    idle: float
    busy: float
    previous: float
    first_value: float
    other_values: float
    peaks: list[float]
    copying: float
    excess: float

    @property
    def ratio(self) -> float:
        """Norm of the first value over that of the others."""
        return self.first_value / self.other_values


def read(model: Decoder, chain: Chain, x: Tensor) -> Reading:
    """What a model does on sequences x (B,N+1)."""
    inputs, after = x[:, :-1], x[:, 1:]
    looks = model.looks(inputs)
    weights, norms = looks[0].weights[:, 0], looks[0].values[:, 0].norm(dim=-1)
    trigger = torch.from_numpy(chain.triggers)[inputs]
    other = ~trigger
    other[:, 0] = False
    with torch.no_grad():
        logs = model(inputs).log_softmax(-1)
    p = torch.from_numpy(chain.transition).float()[inputs[other]]
    return Reading(
        idle=weights[..., 0][other].mean().item(),
        busy=weights[..., 0][trigger].mean().item(),
        previous=weights.diagonal(-1, 1, 2)[trigger[:, 1:]].mean().item(),
        first_value=norms[:, 0].mean().item(),
        other_values=norms[:, 1:].mean().item(),
        peaks=[peak(look) for look in looks],
        copying=F.nll_loss(logs[trigger], after[trigger]).item(),
        excess=(torch.xlogy(p, p) - p * logs[other][:, :-1]).sum(-1).mean().item(),
    )


def peak(look: Look) -> float:
    """Residual norm of the first token over that of the others."""
    norms = look.residual.norm(dim=-1)
    return (norms[:, 0].mean() / norms[:, 1:].mean()).item()


class Run(NamedTuple):
    """A trained model's readings by step."""

    model: Decoder
    readings: list[tuple[int, Reading]]

    @property
    def last(self) -> Reading:
        """After training."""
        return self.readings[-1][1]

    @property
    def growth(self) -> float:
        """Norm of the first value, after training over before."""
        return self.last.first_value / self.readings[0][1].first_value


@dataclass(frozen=True)
class BigramBackcopy:
    """symbols, triggers: how many; length: tokens read; dim: width of the model; batch, steps,
    rate: of training; deep_steps: of the model with three layers; watch: readings on the way.
    """

    symbols: int = 64
    triggers: int = 5
    length: int = 64
    dim: int = 64
    batch: int = 32
    steps: int = 1500
    deep_steps: int = 750
    rate: float = 3e-3
    watch: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.length - 3, self.dim, self.batch, self.steps, self.deep_steps, self.watch) < 1:
            raise ArgumentError("sizes", "at least 1 (length 4)", self)
        if not 1 <= self.triggers < self.symbols:
            raise ArgumentError("triggers", f"1 to {self.symbols - 1}", self.triggers)

    def run(self, progress: Progress) -> Outcome:
        """Train three models on the same chain."""
        chain = Chain.drawn(self.symbols, self.triggers, self.seed)
        count = Steps(2 * self.steps + self.deep_steps, progress)
        soft = self.trained(chain, "softmax", 1, self.steps, count)
        relu = self.trained(chain, "relu", 1, self.steps, count)
        deep = self.trained(chain, "softmax", 3, self.deep_steps, count)
        idle = {
            f"{name}, {kind}": [(float(at), getattr(r, field)) for at, r in run.readings]
            for name, run in (("softmax", soft), ("relu", relu))
            for kind, field in (("others", "idle"), ("triggers", "busy"))
        }
        values = {
            name: [(float(at), r.ratio) for at, r in run.readings]
            for name, run in (("softmax", soft), ("relu", relu))
        }
        x = chain.sequences(np.random.default_rng((self.seed, 2)), 1, min(self.length, 32))
        shown = soft.model.looks(x)[0].weights[0, 0].tolist()
        return Outcome(
            figures(soft, relu, deep),
            (
                Curve("Weight on the first token", "step", "mean over queries", idle),
                Curve("Value of the first token", "step", "norm over that of others", values),
            ),
            (Map("Attention of the softmax model", "query", "key", shown),),
        )

    def trained(self, chain: Chain, operator: str, layers: int, steps: int, count: Steps) -> Run:
        """One model, read before, on the way and after."""
        random, test = (np.random.default_rng((self.seed, part)) for part in (0, 1))
        x = chain.sequences(test, 2 * self.batch, self.length + 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = Decoder(
                self.symbols + 1, self.length, self.dim, layers=layers, operator=operator
            )

        def loss() -> Tensor:
            return prediction_loss(model, chain.sequences(random, self.batch, self.length + 1))

        readings = [(0, read(model, chain, x))]
        for step in train(model, loss, steps, self.rate, count):
            if step % max(1, steps // self.watch) == 0 or step == steps:
                readings.append((step, read(model, chain, x)))
        return Run(model, readings)


def figures(soft: Run, relu: Run, deep: Run) -> tuple[Figure, ...]:
    """Weights, norms and losses after training."""
    one, other = soft.last, relu.last
    inner, outer = max(deep.last.peaks[:-1]), deep.last.peaks[-1]
    learned, known = "copying is learned: near 0", "P is learned: near the oracle"
    return (
        Figure(
            "softmax: weight of idle queries on the first token",
            one.idle,
            "most of it (0.60 in a trial of this size)",
            low=0.4,
        ),
        Figure("softmax: the same of triggers", one.busy, "near 0", high=0.05),
        Figure("softmax: weight of triggers one back", one.previous, "most of it", low=0.5),
        Figure("softmax: first value's norm over the others'", one.ratio, "drained", high=0.5),
        Figure("softmax: growth of the first value", soft.growth, "drained: below 1", high=0.8),
        Figure("relu: weight of idle queries on the first token", other.idle, "no sink", high=0.1),
        Figure(
            "relu: first value's norm over the others'", other.ratio, "above softmax's", one.ratio
        ),
        Figure("relu: growth of the first value", relu.growth, "not drained: 1 or more", low=0.9),
        Figure("softmax: loss after triggers", one.copying, learned, high=0.1),
        Figure("relu: loss after triggers", other.copying, learned, high=0.1),
        Figure("softmax: loss beyond P's own", one.excess, known, high=0.1),
        Figure("relu: loss beyond P's own", other.excess, known, high=0.1),
        Figure(
            "three layers: residual norm of the first token over the others', at its largest",
            inner,
            "a peak before the last layer (1.5 in a longer trial)",
            low=1.1,
        ),
        Figure("three layers: the same after the last", outer, "lower again", high=inner),
    )


CARD = StudyCard(
    name="bigram_backcopy",
    build=BigramBackcopy,
    papers=(
        Paper(
            "2410.13835",
            "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena "
            "in LLMs",
            2024,
        ),
    ),
    claim=Claim(
        "softmax heads with nothing to copy park on the first token and drain its value; ReLU "
        "heads do not",
        "regard study bigram_backcopy",
    ),
    seconds=75,
    small={"symbols": 12, "length": 12, "dim": 16, "batch": 8, "steps": 12, "deep_steps": 6},
)
