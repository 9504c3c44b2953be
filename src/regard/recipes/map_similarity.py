"""Which layers of a finished model attend alike, and a plan in which they share their maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.core.moment import Moment
from regard.core.treatment import Treatment
from regard.importance.map_similarity import map_similarity
from regard.plan import Plan, Step
from regard.recipes.watching import watched


@dataclass(frozen=True)
class Watch(Treatment):
    """Changes nothing; notes the maps (B,H,N,M) of every module, and which queries are real."""

    maps: dict[str, Tensor] = field(default_factory=dict)
    real: list[Tensor] = field(default_factory=list)

    def weights(self, weights: Tensor, at: Moment) -> Tensor:
        self.maps[at.site.name] = weights.detach()
        self.real[:] = [at.query_real]
        return weights


@torch.no_grad()
def layer_map_similarity(model: Any, batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """Similarities (L,L) of a decoder's or an encoder's L layers, averaged over the sequences of
    batches, each the keyword arguments of one forward; they hold all maps of a batch at once.

    Raises:
        ArgumentError: there is no batch.
    """
    total, sequences = torch.zeros(()), 0
    for batch in batches:
        watch = Watch()
        with watched(model, watch):
            model(**batch)
        size = len(watch.real[0])
        total = total + size * map_similarity(list(watch.maps.values()), watch.real[0]).cpu()
        sequences += size
    if not sequences:
        raise ArgumentError("batches", "one batch or more", 0)
    return total / sequences


def shared_plan(blocks: Sequence[tuple[int, ...]]) -> Plan:
    """The plan in which the layers of each block share the map of its first."""
    return Plan(
        name="shared maps",
        steps=tuple(Step(treatment="shared_maps", layers=block) for block in blocks),
    )
