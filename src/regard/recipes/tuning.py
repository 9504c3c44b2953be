r"""Continued tuning: what a pruned or otherwise changed model has lost, it mostly learns again.

    loss = mean of -log p(target)        all weights, or thin matrices beside them (`rank`)

Batches are keyword arguments of a forward, from texts or, by `losses.of_task`, from a task.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from regard.core.card import Claim, Paper
from regard.core.mode import in_mode
from regard.core.recipe import RecipeCard
from regard.recipes.losses import hard_loss, inputs_of
from regard.recipes.low_rank import low_rank
from regard.recipes.training import Batches, Watch, trained

RATE, LOW_RANK_RATE = 1e-4, 1e-3


class Tuning(nn.Module):
    """The lesson: predict what comes next."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses by name of keyword arguments of the model's forward."""
        return {"hard": hard_loss(self.model(**inputs_of(batch)).logits, batch)}


def tuned(
    model: Any,
    batches: Batches,
    steps: int,
    *,
    rank: int | None = None,
    rate: float | None = None,
    watch: Watch | None = None,
) -> Any:
    """Train a model in place, and return it. rank: learn matrices of this rank beside the linear
    maps of its blocks, merged at the end; None: learn all weights. rate: None: 1e-4, with a rank
    1e-3.

    Raises:
        ArgumentError: numbers out of range; batches that are too few, or ask nothing.
        UnsupportedError: accelerate is missing.
    """
    if rate is None:
        rate = RATE if rank is None else LOW_RANK_RATE
    with nullcontext() if rank is None else low_rank(model, rank), in_mode(model, True):
        trained(Tuning(model), batches, steps, rate=rate, watch=watch)
    return model


CARD = RecipeCard(
    name="tuning",
    build=tuned,
    papers=(Paper("2504.21174", "Efficient LLMs with AMP: Attention Heads and MLP Pruning", 2025),),
    claim=Claim(
        "a pruned model that is tuned on gets back most of what it lost",
        "regard study weakest_parts_first",
    ),
)
