r"""Shared maps: in a block of layers the first computes the attention weights, and the others use
them on their own values.

    A = softmax(q k^T s) of the block's first layer        o^l = A v^l in every layer of the block

Head h uses the map of head h. The layers that a step names are divided, in their order, into blocks
of `block` (None: they are one block); which layers may share is told by how alike their maps are
(importance/map_similarity.py). A follower computes no scores and no softmax; its keys are still
projected and cached, since the model's own projections run before attention. The layers of a block
must see the same keys: one with a sliding window cannot follow one without.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.moment import Moment
from regard.core.treatment import Treatment, TreatmentCard, Trial
from regard.core.weights import group_values


@dataclass(frozen=True)
class Block:
    """The maps of a block's first layer, (B,h,N,M) by heads, and what its queries may see."""

    maps: dict[tuple[int, ...], Tensor]
    seen: Tensor

    def of(self, heads: tuple[int, ...]) -> Tensor:
        """The map of these heads, however the first layer's were grouped."""
        if heads in self.maps:
            return self.maps[heads]
        rows = {h: x[:, i] for group, x in self.maps.items() for i, h in enumerate(group)}
        return torch.stack([rows[h] for h in heads], 1)


@dataclass(frozen=True)
class SharedMaps(Treatment):
    """block: layers that share a map; 1 changes nothing, None: all the layers of the step."""

    block: int | None = None

    def __post_init__(self) -> None:
        if self.block is not None and self.block < 1:
            raise ArgumentError("block", "at least 1, or None", self.block)

    @property
    def neutral(self) -> bool:
        return self.block == 1

    def leads(self, at: Moment) -> bool:
        """Whether this layer computes the map of its block."""
        order = at.shared.setdefault(f"layers of {at.site.tower}", [])
        if at.site.name not in order:
            order.append(at.site.name)
        index = order.index(at.site.name)
        return index == 0 if self.block is None else index % self.block == 0

    def attention(self, at: Moment) -> Tensor | None:
        if at.call is None:
            raise UnsupportedError("shared_maps", "keys were evicted, or hidden by an earlier step")
        if self.leads(at):
            return None
        block: Block | None = at.shared.get(at.site.tower)
        if block is None or not torch.equal(block.seen, at.seen()):
            raise UnsupportedError(
                "shared_maps", f"{at.site.name} sees other keys than the first layer of its block"
            )
        return group_values(block.of(at.heads), at.v)

    def weights(self, weights: Tensor, at: Moment) -> Tensor:
        """The leader's weights as they are, kept for its followers."""
        if at.shared.get(f"leader of {at.site.tower}") != at.site.name:
            at.shared[f"leader of {at.site.tower}"] = at.site.name
            at.shared[at.site.tower] = Block({}, at.seen())
        block: Block = at.shared[at.site.tower]
        block.maps[at.heads] = weights
        return weights


CARD = TreatmentCard(
    name="shared_maps",
    build=SharedMaps,
    papers=(
        Paper(
            "2409.14595",
            "EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models",
            2024,
        ),
    ),
    claim=Claim(
        "inner layers with like maps share one; first and last layers do not",
        "regard evaluate --plan shared_maps.json --task needle,perplexity",
    ),
    example=Trial({"block": 2}),
    neutral={"block": 1},
    deviations=(
        "followers keep their query and key projections: the model is finished, not distilled",
    ),
)
