r"""Attention by another similarity than the exponential; rows sum to one, or are left alone.

    o_i = 1/Z_i sum_j w_ij v_j        q: (B,H,N,D)  k: (B,H_k,M,D)  v: (B,H_v,M,E)

    of scores    w_ij = f(q_i . k_j s)            f: sigmoid, or elu + 1
    kernels      w_ij = s phi(q_i) . phi(k_j)     phi: identity, elu + 1, or W_2 relu(W_1 x)

s is 1/sqrt(D). Z_i is 1, or if normalised sum_j w_ij + 1e-8; for the two kernels whose weights may
be negative it is max(|sum_j w_ij|, 1). The paper finds that a language model parks attention on its
first token only where rows must sum to one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Golden, Limit, Paper
from regard.core.errors import ArgumentError
from regard.core.mask import Causal
from regard.core.scored import Impl, attend, without_padding
from regard.core.weights import Scored
from regard.features.elu import elu_plus_one

Form = Literal["sigmoid", "elu", "linear_kernel", "elu_kernel", "mlp_kernel"]
FORMS = ("sigmoid", "elu", "linear_kernel", "elu_kernel", "mlp_kernel")
_EPS = 1e-8


@dataclass(frozen=True)
class SimilarityWeights:
    """f(s_ij) / Z_i; for kernels f is the identity. Invisible keys weigh exactly zero."""

    form: Form
    normalise: bool

    @property
    def kind(self) -> Literal["additive", "two_pass"]:
        return "two_pass" if self.normalise else "additive"

    def __call__(self, scores: Tensor, visible: Tensor | None, count: Tensor) -> Tensor:
        if self.form == "sigmoid":
            weights = scores.sigmoid()
        else:
            weights = elu_plus_one(scores) if self.form == "elu" else scores
        weights = weights if visible is None else weights.masked_fill(~visible, 0.0)
        if not self.normalise:
            return weights
        total = weights.sum(-1, keepdim=True)
        signed = self.form in ("linear_kernel", "mlp_kernel")
        return weights / (total.abs().clamp_min(1) if signed else total + _EPS)


class Similarity(nn.Module):
    """Attention by any similarity on q (B,H,N,D), k (B,H_k,M,D), v (B,H_v,M,E).

    Args:
        similarity: "sigmoid" and "elu" are of scores, the others kernels; "mlp_kernel" has
            parameters, shared by the heads. normalise: whether rows are divided by their sums.
            impl: as in `attend`.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        similarity: Form = "sigmoid",
        normalise: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        if similarity not in FORMS:
            raise ArgumentError("similarity", " or ".join(map(repr, FORMS)), similarity)
        self.rule = SimilarityWeights(similarity, normalise)
        self.impl: Impl = impl
        mlp = similarity == "mlp_kernel"
        self.first = nn.Linear(head_dim, head_dim, bias=False) if mlp else None
        self.second = nn.Linear(head_dim, head_dim, bias=False) if mlp else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Output (B,H,N,E)."""
        check_qkv(q, k, v, call)
        q, k, v = without_padding(q, k, v, call)
        method = Scored(normalise=self.rule)
        return attend(self.features(q), self.features(k), v, call, method, impl=self.impl)

    def features(self, x: Tensor) -> Tensor:
        """phi of queries or keys (B,H,N,D); x itself where the similarity is one of scores."""
        if self.first is not None and self.second is not None:
            return self.second(self.first(x).relu())
        return elu_plus_one(x) if self.rule.form == "elu_kernel" else x


_THEIRS: dict[str, Form] = {
    "sim_sigmoid": "sigmoid",
    "sim_elu": "elu",
    "kernel_linear": "linear_kernel",
    "kernel_elu": "elu_kernel",
}


def _replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    call, found = Call(mask=Causal()), {}
    for index in range(len(case["inputs"]) // 3):
        q, k, v = (case["inputs"][f"{name}{index}"] for name in "qkv")
        unit = torch.eye(q.shape[2], dtype=q.dtype).expand(*q.shape[:2], -1, -1)
        for theirs, form in _THEIRS.items():
            for suffix, normalise in (("norm", True), ("nonorm", False)):
                operator = Similarity(q.shape[1], q.shape[3], similarity=form, normalise=normalise)
                name = f"{theirs}_{suffix}{index}"
                found[name] = operator(q, k, v, call).output
                found[f"proxy_{name}"] = row_shares(operator(q, k, unit, call).output)
    return found


def row_shares(weights: Tensor) -> Tensor:
    """Magnitudes of weights (…,N,M) as shares of their row, to compare with softmax weights."""
    sizes = weights.abs()
    return sizes / (sizes.sum(-1, keepdim=True) + _EPS)


CARD = Card(
    name="similarity",
    kind="operator",
    build=Similarity,
    papers=(
        Paper(
            "2410.10781",
            "When Attention Sink Emerges in Language Models: An Empirical View",
            2024,
        ),
    ),
    family="scored",
    patterns=("noncausal self", "causal self", "noncausal cross", "causal cross"),
    grids=(1, 2, 3),
    cost=Cost(time=2, state="keys"),
    claim=Claim(
        "a head without a normaliser turns itself off instead of parking on the first token",
        "regard study sink_or_sigmoid",
    ),
    example=Example(options={"similarity": "mlp_kernel", "normalise": True}),
    limits=(
        Limit(
            {"similarity": "sigmoid", "normalise": False},
            "sigmoid",
            {"logit_bias": 0.0},
            weights=lambda state: {"temperature": torch.tensor(0.0)},
        ),
    ),
    goldens=(
        Golden(
            "32_attn_operations.pt",
            _replay,
            "https://github.com/sail-sg/Attention-Sink",
            "af49727",
        ),
    ),
)
