"""Which sub-layers of a finished model turn its residual stream least, and a plan without them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from regard.core.answers import real_or_all, real_tokens_of
from regard.core.errors import ArgumentError
from regard.core.passage import Passage, passage_of
from regard.core.scene import Scene
from regard.importance.layer_similarity import (
    Drops,
    dropped,
    dropped_in_turn,
    similarity_by_sequence,
)
from regard.plan import Plan, Step
from regard.probes.layer_similarity import LayerSimilarity, streams

SUBLAYERS = {"attention": "attention", "mlp": "mlp", "block": "both"}
"""What is measured, and what leaves it out."""


@torch.no_grad()
def sublayer_similarity(
    model: Any, batches: Iterable[Passage | Mapping[str, Any]], plan: Plan | None = None
) -> dict[str, Tensor]:
    """Mean cosines (L,) of the stream before and after each attention part, each feed-forward part
    and each block of both, over the real tokens of batches (passages, or keyword arguments of one
    forward, `attention_mask` among them if there is padding). plan: what the model does meanwhile.

    Raises:
        ArgumentError: there is no batch.
        UnsupportedError: a block that does not add what its attention gives to its input.
    """
    steps = None if plan is None else plan.resolve(model).table
    scene = Scene.of(model, [passage_of(batch) for batch in batches], steps)
    if not scene.passages:
        raise ArgumentError("batches", "one batch or more", 0)
    sums = {part: torch.zeros(len(scene.chain), dtype=torch.float64) for part in SUBLAYERS}
    with scene.planned():
        for passage, site, finding in LayerSimilarity().run(scene):
            count = real_tokens_of(passage).sum(-1)
            for part in SUBLAYERS:
                found = finding.layers.get(f"{part}_similarity")
                if found is not None:
                    sums[part][site.layer] += (count * found.double()).sum().cpu()
    tokens = sum(int(real_tokens_of(passage).sum()) for passage in scene.passages)
    return {part: total / tokens for part, total in sums.items()}


@torch.no_grad()
def stretch_similarity(
    model: Any, batches: Iterable[Passage | Mapping[str, Any]], count: int
) -> Tensor:
    """Mean cosines (L-count+1,) of the stream before and after each stretch of `count` successive
    blocks, over the real tokens of batches.

    Raises:
        ArgumentError: there is no batch; fewer blocks than that.
    """
    scene = Scene.of(model, [passage_of(batch) for batch in batches])
    if not scene.passages:
        raise ArgumentError("batches", "one batch or more", 0)
    sites, total, tokens = scene.chain, torch.zeros(()), 0
    if not 1 <= count <= len(sites):
        raise ArgumentError("count", f"1 to {len(sites)} blocks", count)
    for passage in scene.passages:
        with streams(scene, sites) as found:
            scene.model(**passage.inputs)
        stream = [found[site.name] for site in sites]
        real = real_or_all(passage, stream[0][0])
        each = [
            similarity_by_sequence(first[0], last[2], real)
            for first, last in zip(stream, stream[count - 1 :], strict=False)
        ]
        total = total + (torch.stack(each).double() * real.sum(-1)).sum(-1).cpu()
        tokens += int(real.sum())
    return total / tokens


def drop_plan(drops: Drops) -> Plan:
    """The plan that leaves these sub-layers out."""
    layers = {part: sorted(i for name, i in drops if name == part) for part in SUBLAYERS}
    return Plan(
        name="layer drop",
        steps=tuple(
            Step(treatment="layer_drop", options={"sublayer": what}, layers=tuple(layers[part]))
            for part, what in SUBLAYERS.items()
            if layers[part]
        ),
    )


def least_needed(
    model: Any,
    batches: Iterable[Passage | Mapping[str, Any]],
    count: int,
    *,
    sublayers: tuple[str, ...] = ("attention",),
    in_turn: bool = False,
) -> Plan:
    """The plan that drops the `count` sub-layers that turn the stream least, of one kind or of
    several together; in_turn: measured again after each.
    """
    batches = list(batches)

    def measure(gone: Drops) -> dict[str, Tensor]:
        found = sublayer_similarity(model, batches, drop_plan(gone))
        return {name: found[name] for name in sublayers}

    drops = dropped_in_turn(measure, count) if in_turn else dropped(measure(()), count)
    return drop_plan(drops)
