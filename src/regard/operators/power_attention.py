r"""PowerAttention: softmax over near blocks, the first blocks, and blocks whose distance is a power
of two.

    o_i = sum_{j visible to i} softmax_j(q_i . k_j s) v_j
    visible: j <= i, and r = i // b - j // b is below `window`, a power of two, or j // b < sinks

q: (B,H,N,D)  k: (B,H_k,M,D)  v: (B,H_v,M,E). A query reads about log2(N / b) blocks, yet d layers
carry information over 2^d blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Golden, Limit, Paper
from regard.core.errors import UnsupportedError
from regard.core.frame import Frame
from regard.core.mask import Causal, Mask
from regard.core.scored import Impl, attend
from regard.core.weights import Scored
from regard.masks.future import hides_future
from regard.masks.power import PowerReach


def power_reach(block: int = 256, window: int = 5, sinks: int = 1) -> Mask:
    """The mechanism's mask."""
    return PowerReach(block, window, sinks)


def power_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    block: int = 256,
    window: int = 5,
    sinks: int = 1,
    impl: Impl = "auto",
) -> Result:
    """Attention with exponential reach (algorithm 1); `window` and `sinks` count blocks.

    Raises:
        UnsupportedError: the call's mask is not causal.
    """
    check_qkv(q, k, v, call)
    if not hides_future(call.mask):
        raise UnsupportedError("power_attention", "it looks back only; the call needs Causal()")
    return attend(q, k, v, call, Scored(mask=power_reach(block, window, sinks)), impl=impl)


def _replay(case: Mapping[str, Any]) -> dict[str, Any]:
    config = case["config"]
    mask = Causal() & PowerReach(config["block_size"], config["window_size"])
    positions = torch.arange(config["N"])[None]
    return {"mask": mask.dense(Frame(1, 1, positions, positions))[0, 0]}


POWER_ATTENTION = Card(
    name="power_attention",
    kind="operator",
    build=power_attention,
    papers=(
        Paper(
            "2503.03588",
            "PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse "
            "Attention",
            2025,
        ),
    ),
    family="scored",
    patterns=("causal self",),
    cost=Cost(time=1.2, state="keys"),  # N log N, at the lengths the contract counts
    claim=Claim(
        "recalls across distances that a window of as many keys cannot bridge",
        "regard compare --task recall --mechanisms "
        "'softmax,power_attention(block=1,window=2),sliding_window(window=8,sinks=1)'",
    ),
    mask=power_reach,
    example=Example(options={"block": 2, "window": 1, "sinks": 1}),
    limits=(Limit({"window": 10**6}, "softmax"),),
    forms=("impl", ("dense", "sdpa", "tiled")),
    goldens=(
        Golden("75_powerattention_masks.pt", _replay, "paper, algorithm 1", "arXiv:2503.03588"),
    ),
)
