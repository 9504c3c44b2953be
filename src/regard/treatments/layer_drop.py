r"""Layer drop: the attention or the feed-forward part of chosen layers is left out, or both; the
residual stream passes.

    x <- x        instead of        x <- x + attention(norm(x))

Nothing is computed and nothing cached, so half the attention layers gone is half the cache gone.
Which parts to drop is measured by how little they turn the stream (importance/layer_similarity.py),
attention parts before all. Positions and masks of the other layers do not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.moment import Site
from regard.core.treatment import Coincides, Sublayer, Treatment, TreatmentCard, Trial


@dataclass(frozen=True)
class LayerDrop(Treatment):
    """sublayer: attention, mlp, or both of them."""

    sublayer: Literal["attention", "mlp", "both"] = "attention"

    def check(self, site: Site, heads: tuple[int, ...]) -> None:
        if len(heads) != site.heads:
            raise ArgumentError("heads", f"all {site.heads} heads of a dropped layer", list(heads))

    @property
    def removes(self) -> frozenset[Sublayer]:
        if self.sublayer == "both":
            return frozenset(("attention", "mlp"))
        return frozenset((self.sublayer,))


CARD = TreatmentCard(
    name="layer_drop",
    build=LayerDrop,
    papers=(
        Paper(
            "2406.15786",
            "What Matters in Transformers? Not All Attention is Needed",
            2024,
        ),
    ),
    claim=Claim(
        "attention layers that hardly turn the stream go with their cache, at little cost",
        "regard evaluate --plan layer_drop.json --task needle,perplexity",
    ),
    example=Trial({"sublayer": "both"}, layers="1"),
    limits=(Coincides({"sublayer": "attention"}, "head_silence"),),
)
