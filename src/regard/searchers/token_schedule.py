r"""Token schedule: what share of the tokens each layer keeps, found layer by layer.

    share(l) = the smallest part of 1 with    score(shares) >= score(all whole) - tolerance

from the first layer to the last, by bisection, since fewer tokens are taken never to help. The
ranking of tokens hardly changes from layer to layer, so only their number has to be found. As
published, dropped tokens are gone for good: a deeper layer keeps no more than the one before, and
while a layer is searched the deeper ones keep as much as it does. A score is any function of the
shares; `scored` makes one of a treatment with a `budget`, such as stream or snapkv, in its layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.mode import in_mode
from regard.core.passage import Passage
from regard.core.searcher import SearcherCard
from regard.plan import Plan, Signature, Step
from regard.plan.resolved import signature
from regard.searchers.answering import mean_loss

Shares = tuple[float, ...]
Score = Callable[[Shares], float]
TITLE = "Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction"


@dataclass(frozen=True, eq=False)
class Schedule:
    """What was found: the share of every layer, its score, and how many schedules were scored."""

    shares: Shares
    score: float
    trials: int


def schedule_plan(
    treatment: str,
    shares: Shares,
    options: dict[str, Any] | None = None,
    *,
    made_for: Signature | None = None,
) -> Plan:
    """The plan in which every layer keeps its share by a treatment with a `budget`; layers of one
    share are one step.

    Raises:
        ArgumentError: a signature of another number of layers.
    """
    if made_for is not None and made_for.layers != len(shares):
        raise ArgumentError("shares", f"one for each of {made_for.layers} layers", len(shares))
    by_share: dict[float, list[int]] = {}
    for layer, share in enumerate(shares):
        if share < 1:
            by_share.setdefault(share, []).append(layer)
    steps = tuple(
        Step(treatment=treatment, options={**(options or {}), "budget": x}, layers=tuple(layers))
        for x, layers in by_share.items()
    )
    return Plan(name="token schedule", made_for=made_for, steps=steps)


def scored(
    model: Any, passages: Sequence[Passage], treatment: str, options: dict[str, Any] | None = None
) -> Score:
    """The score of a schedule: less the loss of the passages' answers, in nats, without dropout."""
    kind = signature(model)

    def score(shares: Shares) -> float:
        plan = schedule_plan(treatment, shares, options, made_for=kind)
        with in_mode(model, False):
            return -mean_loss(model, passages, plan)

    return score


def greedy_schedule(
    score: Score, layers: int, *, tolerance: float = 0.0, levels: int = 32, nested: bool = True
) -> Schedule:
    """The smallest shares, in parts of 1 / `levels`, that keep the score of the untouched model to
    within a tolerance. nested: deeper layers keep at most as much, as where dropped tokens are gone
    for good; otherwise each layer is bounded by itself, the deeper ones still whole.

    Raises:
        ArgumentError: numbers out of range.
    """
    if layers < 1 or levels < 1 or tolerance < 0:
        got = (layers, levels, tolerance)
        raise ArgumentError("layers, levels, tolerance", "at least 1, 1 and 0", got)
    memory = Remembered(score)
    demanded = memory((1.0,) * layers) - tolerance
    kept: list[int] = []
    for layer in range(layers):
        low, high = 1, kept[-1] if nested and kept else levels
        while low < high:
            middle = (low + high) // 2
            rest = [middle if nested else levels] * (layers - layer - 1)
            if memory(tuple(x / levels for x in (*kept, middle, *rest))) >= demanded:
                high = middle
            else:
                low = middle + 1
        kept.append(low)
    shares = tuple(x / levels for x in kept)
    return Schedule(shares, memory(shares), len(memory.known))


class Remembered:
    """A score that is asked once for the same shares."""

    def __init__(self, score: Score) -> None:
        self.score, self.known = score, dict[Shares, float]()

    def __call__(self, shares: Shares) -> float:
        if shares not in self.known:
            self.known[shares] = float(self.score(shares))
            if math.isnan(self.known[shares]):
                raise ArgumentError("score", "a number", self.known[shares])
        return self.known[shares]


CARD = SearcherCard(
    name="token_schedule",
    build=greedy_schedule,
    finds="plan",
    papers=(Paper("2412.00556", TITLE, 2024),),
    claim=Claim(
        "deep layers need fewer tokens than shallow ones, and bisection finds how many",
        "regard study fewer_tokens_deeper",
    ),
)
