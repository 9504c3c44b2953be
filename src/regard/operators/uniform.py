r"""Uniform attention: every visible key weighs the same; the content of queries and keys is not
used.

    o_i = 1/n_i sum_{j visible to i} v_j

n_i is the number of keys row i may see. It is softmax attention at scale 0, the floor for any claim
that mixing must look at content.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.boundary import check_qkv, refuse
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Limit, Paper
from regard.core.scored import attend
from regard.core.weights import Scored


def uniform(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
    """Mean of the visible values."""
    check_qkv(q, k, v, call)
    refuse(call, "uniform", "scale")
    return attend(torch.zeros_like(q), k, v, call, Scored())


UNIFORM_CARD = Card(
    name="uniform",
    kind="operator",
    build=uniform,
    papers=(Paper("2510.11602", "Deconstructing Attention", 2025),),
    family="scored",
    patterns=("noncausal self", "causal self", "noncausal cross", "causal cross"),
    grids=(1, 2, 3),
    cost=Cost(time=2, state="keys"),
    claim=Claim(
        "stays at chance on associative recall",
        "regard compare --task recall --mechanisms softmax,uniform",
    ),
    limits=(Limit({}, "softmax", other_call={"scale": 0.0}),),
)
