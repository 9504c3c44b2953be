r"""Taylor attention ("Approximate"): the exponential of softmax is cut off after its second order.

    a_ij = f(x_ij) / sum_j f(x_ij)        f(x) = 1 + x + x^2 / 2        x_ij = q_i . k_j s

q: (B,H,N,D)  k: (B,H_k,M,D)  v: (B,H_v,M,E). s is 1/sqrt(D). f is at least 1/2 and an inner product
of features (1, x, x x^T / sqrt 2), so a state of 1 + D + D^2 rows serves instead of the keys: time
is linear in N. The "dense" form weighs every pair and honours any mask.

Differs from the paper: it prints a recurrence that normalises the three orders one by one; here, as
in Based, which it cites, they are summed first, which is what the quadratic formula says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Paper
from regard.core.errors import ArgumentError
from regard.core.recurrent import Form, Memory, Recurrent, recur
from regard.core.scored import attend, without_padding
from regard.core.weights import Scored, scale_of
from regard.features.taylor import taylor_features


@dataclass(frozen=True)
class TaylorWeights:
    """1 + x + x^2/2, divided by its sum over visible keys; a row without any gives zeros."""

    kind: Literal["two_pass"] = "two_pass"

    def __call__(self, scores: Tensor, visible: Tensor, count: Tensor) -> Tensor:
        weights = (1 + scores + scores.square() / 2).masked_fill(~visible, 0.0)
        return weights / weights.sum(-1, keepdim=True).masked_fill(count == 0, 1.0)


def taylor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    state: Memory | None = None,
    form: Form | Literal["dense"] = "auto",
) -> Result:
    """Second-order attention; form "dense" or one of the recurrent forms, which take None or
    Causal() as mask and return the memory as `Result.state`.
    """
    check_qkv(q, k, v, call)
    if form == "dense":
        if state is not None:
            raise ArgumentError("form", "a recurrent form to continue a state", form)
        return attend(q, k, v, call, Scored(normalise=TaylorWeights()))
    q, k, v = without_padding(q, k, v, call)
    q = taylor_features(q * scale_of(call, None, q.shape[-1]))
    plain = call.but(scale=None)
    return recur(q, taylor_features(k), v, plain, Recurrent(normalise=True), state=state, form=form)


TAYLOR_CARD = Card(
    name="taylor",
    kind="operator",
    build=taylor,
    papers=(
        Paper(
            "2510.11602",
            "Deconstructing Attention: Investigating Design Principles for Effective "
            "Language Modeling",
            2025,
        ),
        Paper(
            "2402.18668",
            "Simple linear attention language models balance the recall-throughput tradeoff",
            2024,
        ),
    ),
    family="recurrent",
    patterns=("noncausal self", "causal self", "noncausal cross"),
    grids=(1, 2, 3),
    cost=Cost(time=1, state="constant"),
    claim=Claim(
        "comes close to softmax with a state of fixed size",
        "regard compare --task recall --mechanisms softmax,taylor",
    ),
    forms=("form", ("dense", "parallel", "chunk", "scan")),
)
