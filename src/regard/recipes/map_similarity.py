"""Which layers of a finished model attend alike, and a plan in which they share their maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.core.passage import Passage, passage_of
from regard.core.scene import Scene
from regard.importance.map_similarity import map_similarity
from regard.plan import Plan, Step
from regard.probes.map_similarity import maps_of


@torch.no_grad()
def layer_map_similarity(
    model: Any, batches: Iterable[Passage | Mapping[str, Any]], *, rows: int | None = None
) -> Tensor:
    """Similarities (L,L) of a decoder's or an encoder's L layers, averaged over the sequences of
    batches, each a passage or the keyword arguments of one forward; the maps of a batch are held at
    once: whole, or of as many `rows` per sequence.

    Raises:
        ArgumentError: there is no batch.
    """
    scene = Scene.of(model, [passage_of(batch) for batch in batches])
    if not scene.passages:
        raise ArgumentError("batches", "one batch or more", 0)
    total, sequences = torch.zeros(()), 0
    for passage in scene.passages:
        maps = maps_of(scene, passage, rows)
        size = len(maps[0])
        total = total + size * map_similarity(maps).cpu()
        sequences += size
    return total / sequences


def shared_plan(blocks: Sequence[tuple[int, ...]]) -> Plan:
    """The plan in which the layers of each block share the map of its first."""
    return Plan(
        name="shared maps",
        steps=tuple(Step(treatment="shared_maps", layers=block) for block in blocks),
    )
