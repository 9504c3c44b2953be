r"""Sinks come with rows that must sum to one: softmax parks idle heads on the first token, sigmoid
without a normaliser turns them off and predicts as well.

    a_0 = 1/N sum_i A_i0        sink: a_0 > 0.3        A: (N,N), the weights as they are used

Two small decoders learn the same Bigram–Backcopy chain, in which attention has something to do
after triggers alone. Differs from the paper: it measures sigmoid weights as shares of their row. In
so small a model, where only the first token stands out, what little an idle row keeps lies there,
and shares would call that a sink too; their curve is drawn, but not judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.probe import measured
from regard.core.study import Curve, Figure, Map, Outcome, Progress, StudyCard
from regard.operators.similarity import row_shares
from regard.probes.sinks import Sinks
from regard.studies.backcopy_chain import Chain, prediction_loss
from regard.studies.decoder import Decoder, Steps, train

ARMS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "softmax": ("softmax", {}),
    "sigmoid": ("similarity", {"similarity": "sigmoid", "normalise": False}),
}
"""Name in figures -> operator card and its options."""


class Reading(NamedTuple):
    """sinks: share of heads and sequences with a sink on the first token. first, share: mean weight
    it gets, as used and as a share of the row. loss: in nats.
    """

    sinks: float
    first: float
    share: float
    loss: float


def received(weights: Tensor) -> Tensor:
    """a_0 (B,H) of weights (B,H,N,N)."""
    return measured(Sinks(), weights).metrics["sink_first"]


@torch.no_grad()
def read(model: Decoder, x: Tensor, threshold: float) -> Reading:
    """What a model does on sequences x (B,N+1)."""
    weights = [look.weights for look in model.looks(x[:, :-1])]
    first = torch.stack([received(w) for w in weights])
    return Reading(
        (first > threshold).double().mean().item(),
        first.mean().item(),
        torch.stack([received(row_shares(w)) for w in weights]).mean().item(),
        prediction_loss(model, x).item(),
    )


@dataclass(frozen=True)
class SinkOrSigmoid:
    """symbols, triggers: of the chain; length: tokens read; dim, layers, heads: of the models;
    batch, steps, rate: of training; threshold: of a sink; watch: readings on the way.
    """

    symbols: int = 64
    triggers: int = 5
    length: int = 64
    dim: int = 64
    layers: int = 1
    heads: int = 1
    batch: int = 32
    steps: int = 1500
    rate: float = 3e-3
    threshold: float = 0.3
    watch: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = (self.length - 3, self.layers, self.batch, self.steps, self.watch)
        if min(sizes) < 1 or not 1 <= self.triggers < self.symbols:
            raise ArgumentError("sizes", "at least 1 (length 4), triggers below symbols", self)
        if self.heads < 1 or self.dim < 1 or self.dim % self.heads:
            raise ArgumentError("heads", f"a divisor of {self.dim}", self.heads)

    def run(self, progress: Progress) -> Outcome:
        """Train one model of each kind on the same sequences."""
        chain = Chain.drawn(self.symbols, self.triggers, self.seed)
        test = chain.sequences(np.random.default_rng((self.seed, 1)), 100, self.length + 1)
        count = Steps(len(ARMS) * self.steps, progress)
        found, maps = {}, []
        for name in ARMS:
            model, found[name] = self.trained(name, chain, test, count)
            shown = model.looks(test[:1, : min(self.length, 32)])[-1].weights[0, 0]
            maps.append(Map(f"Weights under {name}", "query", "key", shown.tolist()))
        curves = tuple(
            Curve(
                title,
                "step",
                y,
                {
                    name: [(float(at), getattr(reading, field)) for at, reading in path]
                    for name, path in found.items()
                },
            )
            for title, y, field in (
                ("Weight on the first token", "mean over queries", "first"),
                ("Its share of the row", "mean over queries", "share"),
                ("Loss", "nats", "loss"),
            )
        )
        return Outcome(figures(*(path[-1][1] for path in found.values())), curves, tuple(maps))

    def trained(
        self, name: str, chain: Chain, test: Tensor, count: Steps
    ) -> tuple[Decoder, list[tuple[int, Reading]]]:
        """A model, and what was read of it by step."""
        operator, options = ARMS[name]
        random = np.random.default_rng((self.seed, 0))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = Decoder(
                self.symbols + 1,
                self.length,
                self.dim,
                layers=self.layers,
                heads=self.heads,
                operator=operator,
                options=options,
            )

        def loss() -> Tensor:
            return prediction_loss(model, chain.sequences(random, self.batch, self.length + 1))

        path = [(0, read(model, test, self.threshold))]
        for step in train(model, loss, self.steps, self.rate, count):
            if step % max(1, self.steps // self.watch) == 0 or step == self.steps:
                path.append((step, read(model, test, self.threshold)))
        return model, path


def figures(soft: Reading, free: Reading) -> tuple[Figure, ...]:
    """Of softmax and sigmoid."""
    there, none = "there (18 % of the heads of ten layers)", "next to none (0.4 %)"
    equal = "equal (3.70 against 3.73 on text)"
    return (
        Figure("softmax: share of sinks", soft.sinks, there, low=0.5),
        Figure("sigmoid: share of sinks", free.sinks, none, high=0.05),
        Figure("softmax: weight on the first token", soft.first, "above 0.3", low=0.3),
        Figure("sigmoid: weight on the first token", free.first, "near 0", high=0.1),
        Figure("sigmoid: loss less softmax's", free.loss - soft.loss, equal, -0.05, 0.05),
    )


CARD = StudyCard(
    name="sink_or_sigmoid",
    build=SinkOrSigmoid,
    papers=(
        Paper(
            "2410.10781",
            "When Attention Sink Emerges in Language Models: An Empirical View",
            2024,
        ),
    ),
    claim=Claim(
        "softmax parks idle heads on the first token, sigmoid without a normaliser does not, at "
        "equal loss",
        "regard study sink_or_sigmoid",
    ),
    seconds=45,
    small={"symbols": 12, "length": 12, "dim": 16, "batch": 8, "steps": 12},
)
