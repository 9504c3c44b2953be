r"""Token select: all heads of a layer vote, softly, on the tokens in the middle that a query reads
besides the first and the latest ones.

    vote_j = sum_h softmax_j(vote_scale q_h . k_hj),  j in the middle        q_h: mean of a chunk
    read   = the first `init` tokens, the `selected` best of the middle, the last `local` ones

In the prompt each `chunk` of queries chooses together, by its mean query, with `local` counted from
its last one; afterwards each query chooses for itself. kernel > 1 lends a vote to the neighbours
(maximum over `kernel` tokens). Sequences of up to init + selected + local tokens are read whole.
`reuse_above` leaves a choice as it was while decoding, as long as the query's cosine with the one
that made it is greater; tokens that leave the local part meanwhile wait for the next choice.

Differs from the paper: what is read keeps its original positions, while the paper turns it by its
rank among what is read (a host shows keys after rotation); votes are scaled by 1/sqrt(D), 1 is what
was published; heads that share keys vote on those they share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.moment import Moment, Site
from regard.core.selected import choose
from regard.core.treatment import Coincides, Treatment, TreatmentCard, Trial
from regard.core.weights import Softmax, group_scores
from regard.importance.by_position import at_positions, sums_by_position
from regard.importance.query_blocks import query_blocks
from regard.importance.recency import near_or_first


@dataclass(frozen=True)
class TokenSelect(Treatment):
    """init, selected, local: tokens read, see above. chunk: queries of a prompt that choose
    together. kernel: width of pooling, odd. vote_scale: None = 1/sqrt(D). reuse_above: a cosine,
    None = choose each time.
    """

    init: int = 128
    selected: int = 2048
    local: int = 512
    chunk: int = 512
    kernel: int = 1
    vote_scale: float | None = None
    reuse_above: float | None = None

    def __post_init__(self) -> None:
        if self.init < 0 or self.selected < 1:
            raise ArgumentError("init, selected", "init >= 0, selected >= 1", self)
        if not 1 <= self.chunk <= self.local:
            raise ArgumentError("chunk", f"1 to {self.local}, the local tokens", self.chunk)
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ArgumentError("kernel", "an odd number", self.kernel)
        if self.reuse_above is not None and not -1 <= self.reuse_above <= 1:
            raise ArgumentError("reuse_above", "a cosine", self.reuse_above)

    def check(self, site: Site, heads: tuple[int, ...]) -> None:
        if len(heads) != site.heads:
            raise UnsupportedError(
                "token_select", f"all {site.heads} heads of a layer vote; it got {list(heads)}"
            )
        if site.cross or not site.causal:
            raise UnsupportedError("token_select", f"{site.name} is no causal self-attention")

    def visible(self, at: Moment) -> Tensor | None:
        self.check(at.site, at.heads)
        if at.key_positions.shape[1] > 1:
            raise UnsupportedError(
                "token_select", "heads hold different keys; nothing may be evicted"
            )
        if int(at.length.max()) <= self.init + self.selected + self.local:
            return None
        prompt = at.phase == "prefill"
        blocks = query_blocks(at.query_positions, at.query_real, self.chunk if prompt else 1)
        last = blocks.greatest(at.query_positions, -1)
        best = self.best(blocks.mean(at.q), at, last)
        if not prompt and self.reuse_above is not None:
            best = self.reused(best, at, self.reuse_above)
        few = (last < self.init + self.selected + self.local)[:, None, :, None]
        near = near_or_first(last, at.key_positions, self.local, self.init)
        return blocks.spread(at_positions(best, at) | near | few)

    def best(self, q: Tensor, at: Moment, last: Tensor) -> Tensor:
        """The tokens of the middle with most votes from queries q (B,H,T,D), whose blocks end at
        `last` (B,T): booleans by position, (B,1,T,P).
        """
        key, until = at.key_positions[:, :, None], last[:, None, :, None] - self.local
        middle = (key >= self.init) & (key <= until) & at.real[:, :, None]
        scale = at.scale if self.vote_scale is None else self.vote_scale
        votes = Softmax()(group_scores(q, at.k) * scale, middle, middle.sum(-1, keepdim=True))
        votes = sums_by_position(votes.sum(1, keepdim=True), at)
        if self.kernel > 1:
            pooled = F.max_pool1d(votes[:, 0], self.kernel, stride=1, padding=self.kernel // 2)
            votes = pooled[:, None]
        place = torch.arange(votes.shape[-1], device=votes.device)
        middle = (place >= self.init) & (place <= until)
        return choose(votes, middle, self.selected).mask(len(place))

    def reused(self, fresh: Tensor, at: Moment, above: float) -> Tensor:
        """The choices (B,1,N,P) of each query, or the last one made where the query resembles the
        one that made it.
        """
        asked = at.q.transpose(1, 2).flatten(2)  # (B,N,H*D)
        made_by, made = at.memory.get("query"), at.memory.get("choice")
        rows = []
        for query, choice in zip(asked.unbind(1), fresh[:, 0].unbind(1), strict=True):
            if made_by is not None and made is not None:
                same = F.cosine_similarity(query, made_by, dim=-1)[:, None] > above
                made = F.pad(made, (0, choice.shape[-1] - made.shape[-1]))
                query, choice = torch.where(same, made_by, query), torch.where(same, made, choice)
            made_by, made = query, choice
            rows.append(choice)
        at.memory.update(query=made_by, choice=made)
        return torch.stack(rows, 1)[:, None]


CARD = TreatmentCard(
    name="token_select",
    build=TokenSelect,
    papers=(
        Paper(
            "2411.02886",
            "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via "
            "Dynamic Token-Level KV Cache Selection",
            2024,
        ),
    ),
    claim=Claim(
        "a vote of all heads finds the few tokens that matter to a query",
        "regard evaluate --plan token_select.json --task needle",
    ),
    example=Trial({"init": 2, "selected": 6, "local": 5, "chunk": 1, "kernel": 3}),
    limits=(
        Coincides({"selected": 10_000}),
        Coincides({"init": 0, "selected": 1, "local": 10_000}),
    ),
    gaps={"other_heads": "the votes of all heads are needed, so it takes whole layers only"},
)
