r"""HiP: a block of queries reads the keys that a tree search finds, the first ones and the nearest.

    prompt:    the operator `hip`, `query_block` queries choosing together
    decoding:  each token reads its tree's `keys` keys, the first `sinks` and the last `window` ones

While decoding, a search serves `refresh` tokens; keys that leave the window meanwhile wait for the
next one. Each query head searches for itself. The paper leaves its first three layers dense: a step
says so by its `layers`, "3-".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.call import Call
from regard.core.card import Claim
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.moment import Moment, Site
from regard.core.sequence import in_sequence
from regard.core.treatment import Coincides, Treatment, TreatmentCard, Trial
from regard.importance.by_position import at_positions, by_position
from regard.importance.query_blocks import query_blocks
from regard.importance.query_tree import Tree
from regard.importance.recency import seen_near
from regard.importance.tree_search import Representative
from regard.operators.hip import HIP, hip


@dataclass(frozen=True)
class Hip(Treatment):
    """keys: how many the tree finds (`keep` of the operator, like which the others are). refresh:
    tokens that one search serves while decoding.
    """

    keys: int = 512
    block: int = 2
    query_block: int | tuple[int, int] = (64, 2)
    window: int = 256
    sinks: int = 16
    representative: Representative = "center"
    refresh: int = 1

    def __post_init__(self) -> None:
        if self.refresh < 1:
            raise ArgumentError("refresh", "at least 1", self.refresh)
        if self.tree.window < 1:
            raise ArgumentError("window", "at least 1, the token itself", self.window)

    @property
    def tree(self) -> Tree:
        """How keys are searched."""
        return Tree(
            self.keys, self.block, self.query_block, self.window, self.sinks, self.representative
        )

    def check(self, site: Site, heads: tuple[int, ...]) -> None:
        if site.cross or not site.causal:
            raise UnsupportedError("hip", f"{site.name} is no causal self-attention")

    def attention(self, at: Moment) -> Tensor | None:
        if at.phase == "decode" or at.q.shape[2] == 1:
            return None
        if at.softcap is not None or at.bias is not None:
            raise UnsupportedError("hip", "the model caps or biases its scores")
        return hip(
            at.q,
            at.k,
            at.v,
            _call(at).but(scale=at.scale),
            keep=self.keys,
            block=self.block,
            query_block=self.query_block,
            window=self.window,
            sinks=self.sinks,
            representative=self.representative,
        ).output

    def visible(self, at: Moment) -> Tensor | None:
        if at.phase == "prefill":
            return None
        name = f"keys of heads {at.heads}"
        made, age = at.memory.get(name), int(at.memory["age"][0]) if "age" in at.memory else 0
        rows = []
        for i in range(at.q.shape[2]):
            if made is None or (age + i) % self.refresh == 0:
                made = self.found(at, i)
            made = F.pad(made, (0, int(at.length.amax()) - made.shape[-1]))
            rows.append(made)
        at.memory[name] = rows[-1]
        at.memory["age"] = at.length.new_full((len(at.q),), age + len(rows))
        return at_positions(torch.stack(rows, 2), at) | seen_near(at, self.window, self.sinks)

    def found(self, at: Moment, row: int) -> Tensor:
        """The keys that the tree of one query finds, as booleans by position, (B,h,T)."""
        q = at.q[:, :, row : row + 1]
        call = _call(at).but(query_positions=at.query_positions[:, row : row + 1])
        sequence = in_sequence(call, q, at.k)
        k = at.k if call.padding is None else sequence.alignment.front(at.k)
        tree = replace(self.tree, query_block=1)
        reach = sequence.reach.expand(len(q), -1)
        choice = tree.find(q, k, query_blocks(reach, None, 1), reach)
        hits = choice.mask(-(-k.shape[2] // tree.block)).repeat_interleave(tree.block, -1)
        hits = hits[..., : k.shape[2]].transpose(-1, -2)  # in sequence
        there = by_position(
            sequence.alignment.back(hits).transpose(-1, -2) & at.real[:, :, None], at
        )
        return there[:, :, 0]


def _call(at: Moment) -> Call:
    if at.call is None:
        raise UnsupportedError("hip", "keys were evicted, or hidden by an earlier step")
    return at.call


CARD = TreatmentCard(
    name="hip",
    build=Hip,
    papers=HIP.papers,
    claim=Claim(
        "a tree finds the keys a query wants without scoring them all",
        "regard evaluate --plan hip.json --task needle",
    ),
    example=Trial({"keys": 4, "block": 2, "query_block": 1, "window": 3, "sinks": 1}),
    limits=(
        Coincides({"keys": 10_000}),
        Coincides({"keys": 2, "window": 10_000, "query_block": 4}),
    ),
)
