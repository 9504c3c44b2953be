r"""Map similarity: how alike a head attends to the same head of the layer before.

    s_h = cos(A^l_h, A^{l-1}_h)        A_h (r,M): weights of r queries, flattened

The queries are spread evenly over each sequence, so that no matrix of all weights is held. Layers
that attend alike may share their maps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.moment import Moment, Site
from regard.core.passage import Passage
from regard.core.probe import Finding, ProbeCard
from regard.core.scene import Scene
from regard.core.some_rows import spread_rows, weights_of_rows
from regard.core.treatment import Treatment
from regard.importance.map_similarity import head_similarity


@dataclass(frozen=True, eq=False)
class Maps(Treatment):
    """Changes nothing; notes the weights (B,H,r,M) that some queries of every module give, zero
    where a sequence is shorter.
    """

    rows: int | None
    found: dict[str, Tensor] = field(default_factory=dict)

    def attention(self, at: Moment) -> None:
        rows, there = spread_rows(at.query_real, self.rows)
        weights = weights_of_rows(at, rows)
        self.found[at.site.name] = weights.masked_fill(~there[:, None, :, None], 0.0)


@dataclass(frozen=True)
class MapSimilarity:
    """rows: queries that are compared per sequence."""

    rows: int = 64

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ArgumentError("rows", "at least 1", self.rows)

    @torch.no_grad()
    def run(self, scene: Scene) -> Iterator[tuple[Passage, Site, Finding]]:
        for passage in scene.passages:
            maps = maps_of(scene, passage, self.rows)
            for (before, site), (last, own) in zip(
                pairwise(scene.chain), pairwise(maps), strict=True
            ):
                if last.shape != own.shape:
                    raise ArgumentError("maps", f"those of {before.name}", tuple(own.shape))
                yield passage, site, Finding({"map_similarity": head_similarity(last, own)})


def maps_of(scene: Scene, passage: Passage, rows: int | None) -> Sequence[Tensor]:
    """Weights (B,H,r,M) of some queries of a passage (None: all), layer by layer."""
    watch = Maps(rows)
    with torch.no_grad(), scene.treated(watch, *scene.chain):
        scene.model(**passage.inputs)
    return [watch.found[site.name] for site in scene.chain]


CARD = ProbeCard(
    name="map_similarity",
    build=MapSimilarity,
    metrics={"map_similarity": "cosine of the head's weights and those of the layer before's"},
    papers=(
        Paper(
            "2409.14595",
            "EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models",
            2024,
        ),
    ),
    claim=Claim("inner layers attend much alike", "regard atlas"),
)
