r"""Softmax attention: the reference every other mechanism is compared with.

    o_i = sum_j softmax_j(q_i . k_j s) v_j        q: (B,H,N,D)  k: (B,H_k,M,D)  v: (B,H_v,M,E)

s is 1/sqrt(D).
"""

from __future__ import annotations

from torch import Tensor

from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Paper
from regard.core.scored import Impl, attend
from regard.core.weights import Scored


def softmax(q: Tensor, k: Tensor, v: Tensor, call: Call, *, impl: Impl = "auto") -> Result:
    """Scaled dot-product attention (Vaswani et al., eq. 1)."""
    return attend(q, k, v, call, Scored(), impl=impl)


SOFTMAX_CARD = Card(
    name="softmax",
    kind="operator",
    build=softmax,
    papers=(Paper("1706.03762", "Attention Is All You Need", 2017),),
    family="scored",
    patterns=("noncausal self", "causal self", "noncausal cross", "causal cross"),
    grids=(1, 2, 3),
    cost=Cost(time=2, state="keys"),
    claim=Claim(
        "solves associative recall at every length",
        "regard compare --task recall --mechanisms softmax",
    ),
    forms=("impl", ("dense", "sdpa", "tiled", "split")),
)
