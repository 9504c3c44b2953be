r"""VTrans: a smaller model without the parts whose noisy gates carry no information.

    minimise  L(gated model) + beta sum_family w_family information + l1 (s - t) + l2 (s - t)^2
    over gates (and weights), maximise over l1, l2        s: the expected part that goes, t: `ratio`

Gates of four families (information_gates.py) are trained with noise; t rises linearly over
the first half. Those with more noise than signal go, the others' means are folded into the weights.
L is the loss of the text; with a teacher, the divergence from its predictions and states.
"full" learns gates and weights on all batches, "fast" on 3 % of them, again and again, "faster" on
as few, gates alone. `recipes.tuning` goes on from there.

Differs from the paper: a configuration names one number of heads and of units for all layers, so
each layer keeps its best, as many as layers keep on average, and units fill what the target leaves;
attention and feed-forward part of a layer go together. Key heads go with their query heads. A part
that stays though its gate is shut gets its mean like the others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.linears import blocks_of
from regard.core.mode import in_mode
from regard.core.searcher import SearcherCard
from regard.recipes.losses import hard_loss, inputs_of, real_of, soft_loss, state_loss
from regard.recipes.training import Batches, Watch, frozen, trained
from regard.searchers.gate_costs import Measure, costs_of, everything_of
from regard.searchers.information_gates import FAMILIES, InformationGates, multiplied
from regard.searchers.settling import folded, settled
from regard.searchers.slimming import Pruned, parameters_of, pruned

Variant = Literal["full", "fast", "faster"]
SHARE = 0.03  # of the data that the fast variants see
RISE = 0.5  # part of the steps in which the target is reached
FORCE_RATE = 0.1  # learning rate of l1, l2


@dataclass(frozen=True)
class Bottleneck:
    """beta: weight of information; 1e-3 shuts gates within hundreds of steps, the authors take 1e-6
    for many thousands. weights: of the families' information; the authors' 256 of heads goes with
    their beta, with this one it would shut every head. gate_rate, rate: learning rates of gates and
    of the model's weights. temperature: of predictions, where a teacher gives them. measure: what
    `ratio` is a part of; length: tokens of a text, for operations.
    """

    beta: float = 1e-3
    weights: Mapping[str, float] = field(
        default_factory=lambda: {"heads": 8.0, "units": 1.0, "channels": 1.0, "layers": 1.0}
    )
    families: Sequence[str] = FAMILIES
    gate_rate: float = 0.05
    rate: float = 2e-5
    temperature: float = 1.0
    measure: Measure = "parameters"
    length: int = 1024

    def __post_init__(self) -> None:
        if not set(self.families) <= set(self.weights):
            raise ArgumentError("weights", f"one for each of {self.families}", self.weights)
        if min(self.beta, *self.weights.values()) < 0 or self.gate_rate <= 0:
            raise ArgumentError("beta, weights, gate_rate", "no negative numbers", self)


class Gating(nn.Module):
    """The lesson: a model behind its gates. ratio: the part of its cost that is to go, reached
    after so many steps.
    """

    def __init__(
        self, model: Any, teacher: Any, options: Bottleneck, ratio: float, rise: int, seed: int
    ) -> None:
        super().__init__()
        self.model, self.teacher, self.options = model, teacher, options
        self.blocks = blocks_of(model)
        self.gates = InformationGates(model, self.blocks, options.families, seed)
        self.costs = costs_of(model, self.blocks, options.measure, options.length)
        self.whole = float(everything_of(self.costs, model, self.blocks))
        self.force = nn.Parameter(torch.zeros(2, device=next(model.parameters()).device))
        self.ratio, self.rise, self.done = ratio, rise, 0

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses by name of keyword arguments of the model's forward."""
        gap = self.expected_ratio() - self.ratio * min(1.0, (self.done + 1) / self.rise)
        information = self.gates.information(self.options.weights)
        return {
            **self._task(batch),
            "information": self.options.beta * information,
            "target": self.force[0] * gap + self.force[1] * gap.square(),
        }

    def expected_ratio(self) -> Tensor:
        """The part of the cost that is expected to go."""
        return 1 - self.costs.expected(self.gates.soft()) / self.whole

    def _task(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given, taught = inputs_of(batch), self.teacher is not None
        factors = self.gates.drawn(len(batch["input_ids"]))
        with multiplied(self.model, self.blocks, factors):
            found = self.model(**given, output_hidden_states=taught)
        if not taught:
            return {"hard": hard_loss(found.logits, batch)}
        with torch.no_grad():
            wanted = self.teacher(**given, output_hidden_states=True)
        real = real_of(batch)
        return {
            "soft": soft_loss(found.logits, wanted.logits, real, self.options.temperature),
            "states": state_loss(found.hidden_states, wanted.hidden_states, real),
        }


def vtrans(
    model: Any,
    batches: Batches,
    steps: int,
    ratio: float,
    *,
    variant: Variant = "full",
    options: Bottleneck | None = None,
    teacher: Any = None,
    seed: int = 0,
    into: type | None = None,
    watch: Watch | None = None,
) -> Pruned:
    """A model with about `ratio` of its cost gone; `model` stays as it is. into: as in `slim`.

    Raises:
        ArgumentError: a ratio outside (0, 1), unknown variants or families, too few batches.
        UnsupportedError: accelerate is missing; a model of unknown parts, or with channels to lose
            but other norms than root mean squares.
    """
    if not 0 < ratio < 1:
        raise ArgumentError("ratio", "a fraction in (0, 1)", ratio)
    if variant not in ("full", "fast", "faster"):
        raise ArgumentError("variant", "'full', 'fast' or 'faster'", variant)
    options, student = options or Bottleneck(), copy.deepcopy(model)
    lesson = Gating(student, teacher, options, ratio, max(1, round(RISE * steps)), seed)
    student.requires_grad_(variant != "faster")
    gates = list(lesson.gates.parameters())
    with in_mode(student, True), frozen(teacher or nn.Identity()):
        trained(
            lesson,
            batches if variant == "full" else _few(batches, steps),
            steps,
            rate=options.rate,
            groups=(
                {"params": gates, "lr": options.gate_rate},
                {"params": [lesson.force], "lr": FORCE_RATE, "maximize": True},
            ),
            watch=watch,
        )
    student.requires_grad_(True)
    kept = settled(lesson.gates, lesson.costs, (1 - ratio) * lesson.whole, student, into)
    small = pruned(folded(student, lesson.gates.means()), kept, into=into)
    return Pruned(small.model, kept, small.parameters, parameters_of(model))


def _few(batches: Batches, steps: int) -> Iterator[Mapping[str, Tensor]]:
    """A small part of as many batches, again and again."""
    return cycle(islice(iter(batches), math.ceil(SHARE * steps)))


CARD = SearcherCard(
    name="vtrans",
    build=vtrans,
    finds="model",
    papers=(
        Paper(
            "2406.05276",
            "VTrans: Accelerating Transformer Compression with Variational Information Bottleneck "
            "based Pruning",
            2024,
        ),
    ),
    claim=Claim(
        "without the parts with the noisiest gates a model predicts text better than without as"
        " many random ones",
        "regard study noisy_parts_first",
    ),
)
