r"""Retrieval gates: key heads that need all of the past, told by gates learned on retrieval.

    alpha (layers, key heads) of the recipe duo_gates; those below the quantile at `sparsity` stream

The model is frozen; only the gates learn, on batches that ask for what lies far back. A plan then
gives streaming heads the first `sinks` and the newest `recent` tokens, and their cache with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.searcher import SearcherCard
from regard.plan import Plan
from regard.plan.resolved import signature
from regard.recipes.duo_gates import Blend, GateTraining
from regard.recipes.duo_plan import plan_from_gates
from regard.tasks.task import Batch
from regard.treatments.duo import check_stream


@dataclass(frozen=True, eq=False)
class Gated:
    """What was found: the gates (layers, key heads) in [0, 1], and the plan they give."""

    plan: Plan
    gates: Tensor


@dataclass(frozen=True)
class RetrievalGates:
    """sparsity: share of key heads that stream. steps: of training. learned: sinks and recent
    tokens of the stream while gates learn; used: those of the plan. blend: see the recipe.
    """

    sparsity: float = 0.5
    steps: int = 2000
    learned: tuple[int, int] = (128, 256)
    used: tuple[int, int] = (64, 256)
    blend: Blend = "published"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1 or self.steps < 1:
            raise ArgumentError("sparsity, steps", "in [0, 1], at least 1", self)
        for sinks, recent in (self.learned, self.used):
            check_stream(sinks, recent)

    def run(
        self,
        model: Any,
        batches: Iterator[Batch],
        progress: Callable[[float, str], None] | None = None,
    ) -> Gated:
        """Learn the gates on batches, such as those of `regard.tasks.needle.Needle`.

        Raises:
            ArgumentError: a model without causal self-attention, batches that ask nothing.
            UnsupportedError: a model that is not of transformers; accelerate is missing.
        """
        sinks, recent = self.learned
        training = GateTraining(model, sinks=sinks, recent=recent, blend=self.blend)
        told = progress or (lambda part, what: None)
        gates = training.run(
            batches,
            self.steps,
            lambda moves: told(moves.done / self.steps, f"distance {moves.distance:.3g}"),
        )
        plan = plan_from_gates(gates, self.sparsity, *self.used)
        return Gated(plan.model_copy(update={"made_for": signature(model)}), gates)


CARD = SearcherCard(
    name="retrieval_gates",
    build=RetrievalGates,
    finds="plan",
    papers=(
        Paper(
            "2410.10819",
            "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
            2024,
        ),
    ),
    claim=Claim(
        "half the key heads need only sinks and recent tokens, and retrieval stays intact",
        "regard study half_the_heads_stream",
    ),
)
