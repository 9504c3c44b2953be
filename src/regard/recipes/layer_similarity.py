"""Which sub-layers of a finished model turn its residual stream least, and a plan without them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from regard.core.answers import real_tokens_of
from regard.core.errors import ArgumentError
from regard.core.passage import passage_of
from regard.core.scene import Scene
from regard.importance.layer_similarity import Drops, dropped, dropped_in_turn
from regard.plan import Plan, Step
from regard.probes.layer_similarity import LayerSimilarity

SUBLAYERS = ("attention", "mlp")


@torch.no_grad()
def sublayer_similarity(model: Any, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Mean cosines (L,) of the stream before and after each attention part and each feed-forward
    part, over the real tokens of batches (keyword arguments of one forward, `attention_mask` among
    them if there is padding).

    Raises:
        ArgumentError: there is no batch.
        UnsupportedError: a block that does not add what its attention gives to its input.
    """
    scene = Scene.of(model, [passage_of(batch) for batch in batches])
    if not scene.passages:
        raise ArgumentError("batches", "one batch or more", 0)
    sums = {part: torch.zeros(len(scene.chain), dtype=torch.float64) for part in SUBLAYERS}
    for passage, site, finding in LayerSimilarity().run(scene):
        count = real_tokens_of(passage).sum(-1)
        for part in SUBLAYERS:
            found = finding.layers.get(f"{part}_similarity")
            if found is not None:
                sums[part][site.layer] += (count * found.double()).sum().cpu()
    tokens = sum(int(real_tokens_of(passage).sum()) for passage in scene.passages)
    return {part: total / tokens for part, total in sums.items()}


def drop_plan(drops: Drops) -> Plan:
    """The plan that leaves these sub-layers out."""
    layers = {part: sorted(i for name, i in drops if name == part) for part in SUBLAYERS}
    return Plan(
        name="layer drop",
        steps=tuple(
            Step(treatment="layer_drop", options={"sublayer": part}, layers=tuple(numbers))
            for part, numbers in layers.items()
            if numbers
        ),
    )


def least_needed(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    count: int,
    *,
    sublayers: tuple[str, ...] = ("attention",),
    in_turn: bool = False,
) -> Plan:
    """The plan that drops the `count` sub-layers that turn the stream least, of one kind or of both
    together; in_turn: measured again after each.
    """
    batches = list(batches)

    def measure(gone: Drops) -> dict[str, Tensor]:
        with drop_plan(gone).applied(model):
            found = sublayer_similarity(model, batches)
        return {name: found[name] for name in sublayers}

    drops = dropped_in_turn(measure, count) if in_turn else dropped(measure(()), count)
    return drop_plan(drops)
