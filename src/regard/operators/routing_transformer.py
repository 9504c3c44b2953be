r"""Routing attention: online k-means sorts queries and keys into clusters, and a query reads only
keys of its own cluster.

    c(x) = argmax_c mu_c . x/|x|
    o_i = sum_j softmax_j(q_i . k_j s) v_j over the last w keys j <= i with c(k_j) = c(q_i)

q (B,H,N,D), k (B,H_k,M,D), v (B,H_v,M,E), centroids mu (H,k,D), s = 1/sqrt(D). Without a mask the w
keys nearest to the centroid are read instead of the last w. Every token is routed on its own, so no
later token can push out an earlier one; a query whose cluster holds no key yet gives zeros. With k
and w near sqrt(N) the cost is N^1.5. The centroids follow the tokens by an explicit k-means step
(`update`), outside of the gradient.

Differs from the paper: there each cluster takes the w nearest queries and the w nearest keys of the
whole sequence (`balanced`), so that under a causal mask the choice depends on the future.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Golden, Limit, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.frame import Frame
from regard.core.grouped import Grouped, attend_in_groups
from regard.core.mask import Causal
from regard.core.scored import without_padding
from regard.core.selected import Choice, Selected, attend_chosen, choose, select
from regard.core.sequence import in_sequence
from regard.core.tiling import GATHERED_KEY
from regard.core.weights import Scored, ScoreMod, repeat_heads
from regard.importance.clusters import (
    SameCluster,
    affinity,
    commitment,
    k_means_step,
    last_members,
    nearest,
    unit,
)

Form = Literal["auto", "sorted", "masked", "gathered"]
SELF_SCORE = -5e4


class RoutingTransformer(nn.Module):
    """Routing attention on q (B,H,N,D), k (B,H_k,M,D), v (B,H_v,M,E).

    Args:
        heads: H. head_dim: D. clusters: centroids per head. window: keys read per query.
        shared_qk: for keys that are the queries: they are brought to length one, and a token reads
            itself only where it sees nothing else.
        balanced: the published choice, see above. memory: learned keys and values per cluster, for
            the balanced choice. commitment: factor on the loss left in call.notes.
        impl: "sorted" sorts keys by cluster (N*window operations), "masked" and "gathered" are the
            executors of every selecting mechanism, which serve any mask; "auto" sorts where it can
            and where windows are short against the sequence.
    """

    centroids: Tensor

    def __init__(
        self,
        heads: int,
        head_dim: int,
        clusters: int = 16,
        window: int = 64,
        *,
        shared_qk: bool = False,
        balanced: bool = False,
        memory: int = 0,
        commitment: float = 1e-4,
        impl: Form = "auto",
    ) -> None:
        super().__init__()
        if clusters < 1 or window < 1:
            raise ArgumentError("clusters, window", "at least 1", (clusters, window))
        if memory and not balanced:
            raise ArgumentError("memory", "0 unless balanced", memory)
        if impl not in get_args(Form):
            raise ArgumentError("impl", f"one of {get_args(Form)}", impl)
        self.window, self.shared_qk, self.balanced = window, shared_qk, balanced
        self.memory, self.commitment, self.impl = memory, commitment, impl
        self.register_buffer("centroids", unit(torch.randn(heads, clusters, head_dim)))
        shape = (heads, clusters, memory, head_dim)
        if memory:
            self.memory_k = nn.Parameter(torch.randn(shape))
            self.memory_v = nn.Parameter(torch.randn(shape))

    @torch.no_grad()
    def update(self, x: Tensor, real: Tensor | None = None, decay: float = 0.999) -> None:
        """Move the centroids towards one k-means step on x (B,H,N,D), of which `real` (B,N) count;
        decay 0 takes the whole step.
        """
        after = k_means_step(unit(x), self.centroids, real)
        self.centroids.mul_(decay).add_(after, alpha=1 - decay)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Output (B,H,N,E); call.notes receives "commitment_loss"."""
        check_qkv(q, k, v, call)
        q, k, v = without_padding(q, k, v, call)
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
        k = unit(k) if self.shared_qk else k
        if call.notes is not None:
            sides = [(q, call.query_padding), (k, call.padding)][: 1 if self.shared_qk else 2]
            losses = [commitment(unit(x), self.centroids, real) for x, real in sides]
            call.note("commitment_loss", self.commitment * sum(losses) / len(losses))
        score = _unless_itself(call.frame(q, k)) if self.shared_qk else None
        run = self._balanced if self.balanced else self._routed
        return run(q, k, v, call, score)

    def _routed(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, score: ScoreMod | None
    ) -> Result:
        sortable = call.mask is None or call.mask == Causal()
        if self.impl == "sorted" and not sortable:
            raise UnsupportedError("impl='sorted'", "it takes the mask None or Causal()")
        keys, limit = unit(k.detach()), k.shape[2]
        own, theirs = nearest(unit(q), self.centroids), nearest(keys, self.centroids)
        if call.mask is None:
            order = affinity(keys, self.centroids).amax(-1).argsort(dim=-1, stable=True)
        else:
            sequence = in_sequence(call, q, k)
            order, limit = sequence.alignment.order[:, None], sequence.reach[:, None]
        inner = Scored(score=score, mask=SameCluster(own, theirs))
        rank = order.argsort(-1).to(torch.float64)
        method = Selected(rank[:, :, None], self.window, inner=inner)
        if self.impl == "gathered":
            return select(q, k, v, call, method, impl="gathered")
        pays = GATHERED_KEY * self.window < k.shape[2]
        if self.impl == "masked" or not sortable or (self.impl == "auto" and not pays):
            return select(q, k, v, call, method)
        if call.padding is not None:
            theirs = theirs.masked_fill(~call.padding[:, None], -1)
        choice = last_members(own, theirs, order, limit, self.window)
        return attend_chosen(q, k, v, call, method, choice, impl="gathered")

    def members(self, x: Tensor, real: Tensor | None = None) -> Choice:
        """The `window` tokens of x (B,H,N,D) nearest to each centroid, nearest first: (B,H,k,w)."""
        near = affinity(unit(x.detach()), self.centroids).mT
        allowed = torch.ones_like(near, dtype=torch.bool)
        return choose(near, allowed if real is None else real[:, None, None], self.window)

    def _balanced(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, score: ScoreMod | None
    ) -> Result:
        theirs = self.members(k, call.padding)
        own = theirs if self.shared_qk else self.members(q, call.query_padding)
        extra = (self.memory_k, self.memory_v) if self.memory else None
        return attend_in_groups(q, k, v, call, Grouped(own, theirs, Scored(score=score), extra))


def _unless_itself(frame: Frame) -> ScoreMod:
    """A token reads itself only where it sees nothing else."""

    def score(scores: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        pairs = frame.at(b, h, query, key)
        return torch.where(pairs.query == pairs.key, SELF_SCORE, scores)

    return score


def _authors_module(config: Mapping[str, Any], state: Mapping[str, Any]) -> RoutingTransformer:
    means, memory_k = state["kmeans.means"], state["mem_key"]
    module = RoutingTransformer(
        config["num_heads"],
        config["head_dim"],
        config["num_clusters"],
        config["window_size"],
        shared_qk=config["shared_qk"],
        balanced=True,
        memory=memory_k.shape[2],
        commitment=config["commitment"],
    ).to(means)
    weights = {"centroids": means}
    if memory_k.shape[2]:
        weights |= {"memory_k": memory_k, "memory_v": state["mem_value"]}
    module.load_state_dict(weights)
    return module.eval()


def _replay(case: Mapping[str, Any]) -> dict[str, Any]:
    config, inputs = case["config"], case["inputs"]
    module = _authors_module(config, case["state_dict"])
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    call = Call(mask=Causal() if config["causal"] else None, notes={})
    out = module(q, k, v, call).output
    return {
        "out": out,
        "aux_loss": (call.notes or {})["commitment_loss"][0],
        "q_indices": module.members(q).index,
        "kv_indices": module.members(q if config["shared_qk"] else k).index,
        "buckets": nearest(unit(q), module.centroids),
        "means_after_one_iter": k_means_step(unit(q), module.centroids),
    }


def _near_root(size: tuple[int, ...]) -> dict[str, int]:
    return {"clusters": isqrt(size[0]), "window": isqrt(size[0])}


ROUTING_TRANSFORMER = Card(
    name="routing_transformer",
    kind="operator",
    build=RoutingTransformer,
    papers=(
        Paper(
            "2003.05997",
            "Efficient Content-Based Sparse Attention with Routing Transformers",
            2020,
        ),
    ),
    family="selected",
    patterns=("noncausal self", "causal self", "noncausal cross", "causal cross"),
    cost=Cost(time=1.5, state="keys"),
    claim=Claim(
        "recalls a part, that where query and key share a cluster, from a quarter of the keys",
        'regard compare --mechanisms "softmax,routing_transformer(clusters=4,window=16)"',
    ),
    example=Example(sized=_near_root),
    limits=(Limit({"clusters": 1, "window": 10**6}, "softmax"),),
    forms=("impl", ("masked", "gathered", "sorted")),
    goldens=(
        Golden(
            "69_routing_kmeans.pt",
            _replay,
            "lucidrains/routing-transformer:routing_transformer/routing_transformer.py",
            "3f6c461a03",
        ),
    ),
    convert=_authors_module,
    deviations=(
        "a query belongs to one cluster and reads its last keys, so that the future stays unseen",
        "centroids move by an explicit call, not in the backward pass",
        "the published balanced choice is balanced=True",
    ),
)
