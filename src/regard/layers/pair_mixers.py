r"""Mixers whose weight of a pair of tokens is a function of a query and a key, on x itself.

    y_t = 1/sqrt(L D) sum_s q_t . k_s x_s + x_t              low rank
    y_t = sum_s softmax_s(q_t . k_s / sqrt(D)) x_s + x_t     attention

x, y: (B,N,C)  q, k: (B,H,N,D), linear in the tokens (`data_dependent`) or learned for each of L
positions. Nothing projects values or outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.card import Card, Claim, Cost, Limit
from regard.core.weights import Softmax
from regard.layers.attention import split_heads
from regard.layers.justdense import EXAMPLE, PAPERS, MatrixMixer, mixer_golden, mixer_sizes, xavier

WIDTH = 2
"""Width D of queries and keys in the examples."""


class PairMixer(MatrixMixer):
    """Weights from queries and keys, (B,N,C) -> (B,N,C); a subclass says how.

    Args:
        dim: width C. heads: heads H. length: L, the largest number of tokens. qk_dim: D.
        data_dependent: queries and keys are linear in the tokens. inner_residual: add the input.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        length: int = 512,
        qk_dim: int = 16,
        data_dependent: bool = True,
        inner_residual: bool = True,
    ) -> None:
        scale = (length * qk_dim) ** -0.5
        super().__init__(dim, heads, length, scale=scale, inner_residual=inner_residual)
        self.data_dependent = data_dependent
        if data_dependent:
            self._add_projections(qk_dim)
        else:
            self._add_free(qk_dim)

    def _add_projections(self, qk_dim: int) -> None:
        self.q_proj = nn.Linear(self.dim, self.heads * qk_dim, bias=False)
        self.k_proj = nn.Linear(self.dim, self.heads * qk_dim, bias=False)

    def _add_free(self, qk_dim: int) -> None:
        self.queries = xavier(self.heads, self.length, qk_dim)
        self.keys = xavier(self.heads, self.length, qk_dim)

    def matrix(self, x: Tensor, visible: Tensor) -> Tensor:
        """(B or 1, H, N, N)."""
        if self.data_dependent:
            q, k = split_heads(self.q_proj(x), self.heads), split_heads(self.k_proj(x), self.heads)
        else:
            q, k = (free[None, :, : x.shape[1]] for free in (self.queries, self.keys))
        return self.between(q, k, visible).to(x.dtype)

    def between(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        """Matrices (B,H,N,N) of queries and keys (B,H,N,D); visible (B or 1, 1, N, N)."""
        raise NotImplementedError


class LowRankMixer(PairMixer):
    """Products of queries and keys."""

    def between(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        """(B,H,N,N)."""
        return q @ k.transpose(-1, -2)


class AttentionMixer(PairMixer):
    """Softmax of those products; no length enters."""

    def between(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        """(B,H,N,N), against the scale that the other mixers share."""
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return Softmax()(scores, visible, visible.sum(-1, keepdim=True)) / self.scale


def convert_pair(
    build: type[PairMixer], config: Mapping[str, Any], state: Mapping[str, Any]
) -> PairMixer:
    """A mixer with the authors' weights, which lack the projections of a data-dependent one."""
    dim, heads, length = mixer_sizes(config)
    module = build(
        dim,
        heads,
        length=length,
        qk_dim=config["qk_dim"],
        data_dependent=config["is_data_dependent"],
    )
    own = module.state_dict()
    for ours, theirs in (("queries", "q_matrix"), ("keys", "k_matrix")):
        if theirs in state:
            own[ours] = state[theirs].transpose(0, 1)
    if "bias" in state:
        own["bias"] = state["bias"]
    module.load_state_dict(own)
    return module


def replay_pair(build: type[PairMixer], case: Mapping[str, Any]) -> dict[str, Any]:
    """Run one case of the authors' mixer, on its own queries and keys where it has some."""
    module, inputs = convert_pair(build, case["config"], case["state_dict"]), case["inputs"]
    if not module.data_dependent:
        return {"y": module(inputs["v"])}
    q, k = (split_heads(inputs[name], module.heads) for name in ("q", "k"))
    visible = torch.ones(1, 1, q.shape[2], q.shape[2], dtype=torch.bool)
    return {"y": module.mixed(inputs["v"], module.between(q, k, visible), visible)}


def as_dense(weights: Callable[[Mapping[str, Tensor]], Tensor]) -> Limit:
    """Without data dependence a mixer is one matrix (H,L,L) per head, got from its state dict."""
    return Limit(
        {"data_dependent": False},
        "justdense",
        {"length": EXAMPLE.options["length"]},
        weights=lambda state: {"weight": weights(state)},
    )


def pair_card(name: str, build: type[PairMixer], golden: str, claim: str, *limits: Limit) -> Card:
    """The card of a mixer; `golden` is the authors' class."""
    return Card(
        name=name,
        kind="layer",
        build=build,
        papers=PAPERS,
        family="free",
        patterns=("noncausal self", "causal self"),
        grids=(1, 2, 3),
        cost=Cost(time=2, state="none"),
        claim=Claim(claim, f"regard show {name} --length 24"),
        example=replace(EXAMPLE, options={**EXAMPLE.options, "qk_dim": WIDTH}),
        limits=limits,
        goldens=(mixer_golden(golden, partial(replay_pair, build)),),
        convert=partial(convert_pair, build),
    )


def _products(state: Mapping[str, Tensor]) -> Tensor:
    return state["queries"] @ state["keys"].transpose(-1, -2) * WIDTH**-0.5


LOW_RANK_MIXER = pair_card(
    "low_rank_mixer",
    LowRankMixer,
    "LowRank",
    "mixes with weights of either sign that need not sum to one",
    as_dense(_products),
)
ATTENTION_MIXER = pair_card(
    "attention_mixer",
    AttentionMixer,
    "Attention",
    "mixes the tokens themselves with softmax weights",
)
