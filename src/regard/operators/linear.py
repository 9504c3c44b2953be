r"""Linear attention: positive features instead of the exponential, so keys and values fold into a
state.

    o_i = phi(q_i) . S / phi(q_i) . z        S = sum_j phi(k_j) v_j^T        z = sum_j phi(k_j)

q: (B,H,N,D)  k: (B,H_k,M,D)  v: (B,H_v,M,E); phi(x) = elu(x) + 1. Causal sums stop at the query. No
1/sqrt(D): phi is not homogeneous, and scores are not exponentiated.
"""

from __future__ import annotations

from torch import Tensor

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Paper
from regard.core.recurrent import Form, Memory, Recurrent, recur
from regard.core.scored import without_padding
from regard.features.elu import elu_plus_one


def linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    chunk: int = 64,
    form: Form = "auto",
    state: Memory | None = None,
) -> Result:
    """Normalised linear attention (Katharopoulos et al., eq. 5, 9–12)."""
    check_qkv(q, k, v, call)
    q, k, v = without_padding(q, k, v, call)
    method = Recurrent(normalise=True, chunk=chunk)
    return recur(elu_plus_one(q), elu_plus_one(k), v, call, method, state=state, form=form)


LINEAR_CARD = Card(
    name="linear",
    kind="operator",
    build=linear,
    papers=(
        Paper(
            "2006.16236",
            "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
            2020,
        ),
    ),
    family="recurrent",
    patterns=("noncausal self", "causal self", "noncausal cross"),
    grids=(1, 2, 3),
    cost=Cost(time=1, state="constant"),
    claim=Claim(
        "needs time linear in the length and recalls less than softmax",
        "regard compare --task recall --mechanisms softmax,linear",
    ),
    forms=("form", ("parallel", "chunk", "scan")),
)
