r"""Delta pages: while decoding, a few layers attend in full and choose pages of tokens for the
sparse layers after them, one choice for all heads.

    token score_j = max_h softmax_j(q_h . k_j s)        page score_c = sum of token scores in page c
    C = the last `recent` pages and the best others, `pages` in all

Layers in `full_layers` are attended in full; one of them that a sparse layer follows chooses, anew
for every decoded token, and the sparse layers up to the next full one read the tokens of C alone.
Equal pages: the earlier one. Up to trigger * pages pages, everything is read. Pages are counted by
position; the prompt is read in full, and no key is ever dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from regard.core.card import Claim, Golden, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.moment import Moment, Site
from regard.core.selected import choose
from regard.core.treating import weights_of
from regard.core.treatment import Coincides, Treatment, TreatmentCard, Trial

EARLIER = 1e-7
"""What a page loses per page before it, so that ties go to the earlier one."""


def page_scores(tokens: Tensor, positions: Tensor, page: int) -> Tensor:
    """Sums of token scores (B,N,M) over pages of `page` positions (B,M): (B,N,pages)."""
    number = positions.div(page, rounding_mode="floor")
    count = int(number.amax()) + 1 if number.numel() else 0
    sums = tokens.new_zeros(*tokens.shape[:2], count)
    return sums.scatter_add_(2, number[:, None].expand_as(tokens), tokens)


@dataclass(frozen=True)
class DeltaPages(Treatment):
    """page: tokens of one. pages: how many are read, the `recent` last ones included. full_layers:
    layers attended in full. aggregate: how token scores of several heads become one. trigger: see
    above.
    """

    page: int = 16
    pages: int = 64
    recent: int = 8
    full_layers: tuple[int, ...] = (0, 1, 2, 14, 22)
    aggregate: Literal["max", "mean"] = "max"
    trigger: float = 1.0

    def __post_init__(self) -> None:
        if self.page < 1 or not 0 < self.recent <= self.pages:
            raise ArgumentError("page, pages, recent", "page >= 1, pages >= recent >= 1", self)
        if 0 not in self.full_layers or min(self.full_layers) < 0:
            raise ArgumentError("full_layers", "layer 0 and others", self.full_layers)
        if self.trigger < 1:
            raise ArgumentError("trigger", "at least 1", self.trigger)

    def check(self, site: Site, heads: tuple[int, ...]) -> None:
        if max(self.full_layers) >= site.layers:
            raise ArgumentError("full_layers", f"layers below {site.layers}", self.full_layers)

    def visible(self, at: Moment) -> Tensor | None:
        if at.phase == "prefill":
            return None
        layer, name = at.site.layer, f"pages of heads {at.heads}"
        if layer in self.full_layers:
            if layer + 1 < at.site.layers and layer + 1 not in self.full_layers:
                at.shared[name] = self.chosen(self.scores(at), at.query_positions)
            return None
        if name not in at.shared:
            planner = max(n for n in self.full_layers if n < layer)
            raise UnsupportedError(
                "delta_pages", f"layer {planner}, which chooses, is not in the step for these heads"
            )
        pages = at.shared[name][:, None].expand(-1, at.key_positions.shape[1], -1, -1)
        number = at.key_positions.div(self.page, rounding_mode="floor")[:, :, None]
        found = pages.gather(3, number.expand(-1, -1, at.q.shape[2], -1))
        return found if found.shape[1] == 1 else found.repeat_interleave(at.group, 1)

    def scores(self, at: Moment) -> Tensor:
        """Page scores (B,N,pages) of each query."""
        if at.key_positions.shape[1] > 1:
            raise UnsupportedError(
                "delta_pages", "heads hold different keys; nothing may be evicted"
            )
        return page_scores(self.voted(weights_of(at)), at.key_positions[:, 0], self.page)

    def voted(self, weights: Tensor) -> Tensor:
        """Weights (B,h,N,M) of all heads as one score per token, (B,N,M)."""
        return weights.amax(1) if self.aggregate == "max" else weights.mean(1)

    def chosen(self, scores: Tensor, queries: Tensor) -> Tensor:
        """Pages that queries at positions (B,N) read, as booleans like scores (B,N,pages)."""
        number = torch.arange(scores.shape[-1], device=scores.device)
        own = queries.div(self.page, rounding_mode="floor")[..., None]
        forced = number > own - self.recent
        ranked = (scores - EARLIER * number).masked_fill(forced, float("inf"))
        best = choose(ranked, number <= own, self.pages).mask(len(number))
        few = own + 1 <= self.pages * self.trigger
        return (best | few) & (number <= own)


def replay(case: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' page scores and chosen pages of one golden case, from scores of one query."""
    config, scores = case["config"], case["inputs"]["logits"]
    method = DeltaPages(
        page=config["page_size"],
        pages=config["subset_cache_size"],
        recent=config["L"],
        full_layers=(0,),
    )
    positions = torch.arange(scores.shape[-1]).expand(len(scores), -1)
    length = torch.tensor(config["lengths"])[:, None]
    scores = scores.masked_fill((positions >= length)[:, None], float("-inf"))
    tokens = method.voted(scores.softmax(-1)[:, :, None])
    pages = page_scores(tokens, positions, method.page)
    chosen = method.chosen(pages, length - 1)[:, 0]
    return {
        "page_scores": pages[:, 0],
        "selected_pages": [row.nonzero()[:, 0] for row in chosen],
    }


CARD = TreatmentCard(
    name="delta_pages",
    build=DeltaPages,
    papers=(
        Paper(
            "2510.09883",
            "DELTA: Dynamic Layer-Aware Token Attention for Efficient Long-Context Reasoning",
            2025,
        ),
    ),
    claim=Claim(
        "pages chosen in a few full layers serve the layers between them",
        "regard evaluate --plan delta_pages.json --task needle",
    ),
    example=Trial({"page": 2, "pages": 4, "recent": 2, "full_layers": [0]}),
    limits=(Coincides({"full_layers": [0], "pages": 10_000}),),
    goldens=(
        Golden("209_delta_pages.pt", replay, "https://github.com/hoenza/DELTA", "c35407303d"),
    ),
    gaps={"decoding": "it acts on decoding steps alone"},
)
