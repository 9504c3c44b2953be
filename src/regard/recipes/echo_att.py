r"""EchoAtt: layers that attend alike come to share one attention map, and learn to live with it.

    blocks    successive inner layers whose maps are similar, mean cosine at least `threshold`
    teach     a mean ((h - h_teacher)^2) + b T^2 KL(teacher || student) + c (-log p(target))
    adjust    -log p(target)

The student is the teacher with the treatment `shared_maps` on its blocks; h are the states
before and after each layer. Followers' projections of queries and keys no longer matter
and do not learn; as weights of the model they stay, `spared` counts them.

Differs from the paper: its threshold and the weights of its losses are not known; here they are
options. Dropout is off.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.linears import blocks_of
from regard.core.mode import in_mode
from regard.core.recipe import RecipeCard
from regard.importance.map_similarity import alike
from regard.plan import Plan
from regard.recipes.losses import hard_loss, inputs_of, real_of, soft_loss, state_loss
from regard.recipes.map_similarity import layer_map_similarity, shared_plan
from regard.recipes.training import Batches, Watch, frozen, trained

Blocks = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Weights:
    """What the losses on states, on the teacher's predictions and on the text count, and the
    temperature of the predictions.
    """

    states: float = 1.0
    soft: float = 1.0
    hard: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if min(self.states, self.soft, self.hard) < 0 or self.temperature <= 0:
            raise ArgumentError("weights", "numbers from 0, a temperature above 0", self)


class Sharing(nn.Module):
    """The lesson: a student under its plan; without a teacher it learns from the text alone."""

    def __init__(
        self, student: Any, plan: Plan, teacher: Any = None, weights: Weights | None = None
    ) -> None:
        super().__init__()
        self.student, self.plan, self.teacher = student, plan, teacher
        self.weights = weights or Weights()

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weighted losses by name of keyword arguments of both models' forward."""
        given, of = inputs_of(batch), self.weights
        with self.plan.applied(self.student):
            found = self.student(**given, output_hidden_states=self.teacher is not None)
        if self.teacher is None:
            return {"hard": hard_loss(found.logits, batch)}
        with torch.no_grad():
            wanted = self.teacher(**given, output_hidden_states=True)
        real = real_of(batch)
        parts = {
            "states": of.states * state_loss(found.hidden_states, wanted.hidden_states, real),
            "soft": of.soft * soft_loss(found.logits, wanted.logits, real, of.temperature),
        }
        return parts | ({"hard": of.hard * hard_loss(found.logits, batch)} if of.hard else {})


@dataclass(frozen=True, eq=False)
class Shared:
    """A student, the plan under which it is to be used, and the blocks of layers that share."""

    model: Any
    plan: Plan
    blocks: Blocks


def like_blocks(
    model: Any,
    batches: Sequence[Mapping[str, Any]],
    threshold: float = 0.8,
    *,
    skip_first: int = 1,
    skip_last: int = 1,
    rows: int | None = 64,
) -> Blocks:
    """Blocks of successive layers that attend alike, measured on keyword arguments of forwards.
    rows: queries of each sequence that are compared; None: all, whose maps are held at once.

    Raises:
        ArgumentError: there is no batch, or nothing is so similar.
    """
    found = layer_map_similarity(model, batches, rows=rows)
    blocks = alike(found, threshold, skip_first=skip_first, skip_last=skip_last)
    if not blocks:
        raise ArgumentError("threshold", "one that some neighbouring inner layers reach", threshold)
    return blocks


def followers(model: Any, blocks: Blocks) -> tuple[nn.Module, ...]:
    """The projections to queries and keys that sharing makes idle.

    Raises:
        UnsupportedError: a model that projects queries, keys and values together.
    """
    layers = blocks_of(model)
    return tuple(m for block in blocks for layer in block[1:] for m in layers[layer].heads[:2])


def spared(model: Any, blocks: Blocks) -> int:
    """How many parameters are idle."""
    return sum(p.numel() for m in followers(model, blocks) for p in m.parameters())


def echo_att(
    teacher: Any,
    blocks: Blocks,
    batches: Batches,
    steps: int,
    *,
    adjusting: int = 0,
    weights: Weights | None = None,
    rate: float = 1e-4,
    watch: Watch | None = None,
) -> Shared:
    """Teach a copy of the teacher to share maps in blocks of layers: `steps` of distillation, then
    `adjusting` steps on the text alone.

    Raises:
        ArgumentError: numbers out of range, or too few batches.
        UnsupportedError: accelerate is missing, or a model of unknown parts.
    """
    student, plan, stream = copy.deepcopy(teacher), shared_plan(blocks), iter(batches)
    idle = followers(student, blocks)
    for module in idle:
        module.requires_grad_(False)
    with frozen(teacher), in_mode(student, False):
        lesson = Sharing(student, plan, teacher, weights)
        trained(lesson, stream, steps, rate=rate, watch=watch)
        if adjusting:
            trained(Sharing(student, plan), stream, adjusting, rate=rate, watch=watch)
    for module in idle:
        module.requires_grad_(True)
    return Shared(student, plan, blocks)


CARD = RecipeCard(
    name="echo_att",
    build=echo_att,
    papers=(
        Paper(
            "2409.14595",
            "EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models",
            2024,
        ),
    ),
    claim=Claim(
        "taught to, inner layers share one map at little loss",
        "regard study taught_to_share",
    ),
)
