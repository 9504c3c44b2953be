r"""Bidirectional: a decoder's tokens see later ones too, for embedding texts with a language model.

    token i sees key j  iff  the model's mask lets i see j, or j see i        and j - i <= ahead

So the causal mask goes, while a sliding window becomes symmetric and padding stays hidden. `ahead`
bounds how far a token looks (None: to the end; 0 is the model as it was). In decoding token by
token nothing changes: the newest token sees what there is. A text is then embedded by its last
token, by a mean, or by the pools of `regard.features.latent_pool`, from the same study, whose
outputs are held against the authors' here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.card import Claim, Golden, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mask import Causal, Given, Mask, both
from regard.core.model_scores import attend_through
from regard.core.moment import Moment, Site
from regard.core.treatment import Coincides, Treatment, TreatmentCard, Trial
from regard.features.latent_pool import converted
from regard.masks.ahead import Ahead


@dataclass(frozen=True)
class Bidirectional(Treatment):
    """ahead: how many tokens ahead a token may look; None: all, 0: none."""

    ahead: int | None = None

    def __post_init__(self) -> None:
        if self.ahead is not None and self.ahead < 0:
            raise ArgumentError("ahead", "at least 0, or None", self.ahead)

    @property
    def neutral(self) -> bool:
        return self.ahead == 0

    def check(self, site: Site, heads: tuple[int, ...]) -> None:
        if not site.causal:
            raise UnsupportedError("bidirectional", f"{site.name} has no causal mask to lift")

    def attention(self, at: Moment) -> Tensor | None:
        if at.q.shape[2] == 1:
            return None
        if at.call is None:
            raise UnsupportedError(
                "bidirectional", "keys were evicted, or hidden by an earlier step"
            )
        mask = None if self.ahead is None else Ahead(self.ahead)
        if at.visible is not None and not isinstance(at.call.mask, Causal):
            mask = both(symmetric(at.visible), mask)
        return attend_through(at, at.call.but(mask=mask))


def symmetric(visible: Tensor) -> Mask:
    """What a mask (B or 1,H or 1,N,M) shows, and the other way round among the queries' own keys,
    the last N.
    """
    earlier, own = visible.tensor_split([visible.shape[3] - visible.shape[2]], dim=3)
    shown = torch.cat([earlier, own | own.transpose(2, 3)], 3)

    def mod(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        b = b if shown.shape[0] > 1 else b * 0
        h = h if shown.shape[1] > 1 else h * 0
        return shown[b, h, row, column]

    return Given(mod)


def replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' pooled vectors of one golden case."""
    return {"y": converted(case["config"], case["state_dict"])(case["inputs"]["hiddens"])}


SOURCE = "https://github.com/yixuantt/PoolingAndAttn"
CARD = TreatmentCard(
    name="bidirectional",
    build=Bidirectional,
    papers=(
        Paper(
            "2409.02727",
            "Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?",
            2024,
        ),
    ),
    claim=Claim(
        "seeing both ways pays for similarity and retrieval of texts once trained pooling reads it",
        "regard show bidirectional",
    ),
    example=Trial(),
    neutral={"ahead": 0},
    limits=(Coincides({"ahead": 10_000}, "bidirectional"),),
    goldens=(
        Golden("197_lastlayer_pool.pt", replay, SOURCE, "57791d5"),
        Golden("197_multilayer_pool.pt", replay, SOURCE, "57791d5"),
    ),
    gaps={
        "decoding": "in one forward the earlier tokens see the later ones",
        "future": "seeing later tokens is what it is for",
    },
)
