r"""Map sharing: layers that attend alike share one map.

    s(a, b) = mean over heads and sequences of cos(A^a_h, A^b_h)
    blocks: successive inner layers with s >= threshold for all pairs; a block uses its first's map

The first layers and the last stay on their own. Nothing is trained here: at a low threshold the
model has to be tuned afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.passage import Passage
from regard.core.searcher import SearcherCard
from regard.importance.map_similarity import alike
from regard.plan import Plan
from regard.plan.resolved import signature
from regard.recipes.map_similarity import layer_map_similarity, shared_plan


@dataclass(frozen=True, eq=False)
class Shared:
    """What was found: similarities (L,L), the blocks of layers that share, and the plan."""

    plan: Plan
    blocks: tuple[tuple[int, ...], ...]
    similarities: Tensor


def map_sharing(
    model: Any,
    passages: Sequence[Passage],
    threshold: float,
    *,
    skip_first: int = 1,
    skip_last: int = 1,
    rows: int | None = 64,
) -> Shared:
    """Share the maps of layers that are at least `threshold` alike on passages. rows: queries of
    each sequence that are compared; None: all.

    Raises:
        ArgumentError: no passage, negative numbers of layers.
    """
    found = layer_map_similarity(model, passages, rows=rows)
    blocks = alike(found, threshold, skip_first=skip_first, skip_last=skip_last)
    plan = shared_plan(blocks).model_copy(update={"made_for": signature(model)})
    return Shared(plan, blocks, found)


CARD = SearcherCard(
    name="map_sharing",
    build=map_sharing,
    finds="plan",
    papers=(
        Paper(
            "2409.14595",
            "EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models",
            2024,
        ),
    ),
    claim=Claim(
        "layers chosen for their like maps share one at less loss than others do",
        "regard study sharing_by_likeness",
    ),
)
