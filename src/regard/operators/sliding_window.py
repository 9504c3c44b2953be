r"""Sliding-window attention with sinks: softmax over the last `window` keys and the first `sinks`
ones.

o_i = sum_{j : |i-j| < w or j < s} softmax_j(q_i . k_j s) v_j        q: (B,H,N,D)  k: (B,H_k,M,D)
v: (B,H_v,M,E)
"""

from __future__ import annotations

from torch import Tensor

from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Limit, Paper
from regard.core.mask import Mask
from regard.core.scored import Impl, attend
from regard.core.weights import Scored
from regard.masks.sinks import Sinks
from regard.masks.window import Window


def window_with_sinks(window: int = 256, sinks: int = 4) -> Mask:
    """The mechanism's mask; the call says whether it is causal."""
    return Window(window) | Sinks(sinks) if sinks else Window(window)


def sliding_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    window: int = 256,
    sinks: int = 4,
    impl: Impl = "auto",
) -> Result:
    """Attention within `window` positions (own included) plus `sinks` first positions
    (StreamingLLM, section 3.2).
    """
    return attend(q, k, v, call, Scored(mask=window_with_sinks(window, sinks)), impl=impl)


SLIDING_WINDOW = Card(
    name="sliding_window",
    kind="operator",
    build=sliding_window,
    papers=(
        Paper("2004.05150", "Longformer: The Long-Document Transformer", 2020),
        Paper("2309.17453", "Efficient Streaming Language Models with Attention Sinks", 2023),
    ),
    family="scored",
    patterns=("noncausal self", "causal self"),
    cost=Cost(time=1, state="constant"),
    claim=Claim(
        "recalls within its window and fails beyond",
        "regard compare --task recall --mechanisms softmax,sliding_window",
    ),
    mask=window_with_sinks,
    example=Example(options={"window": 3, "sinks": 2}),
    limits=(Limit({"window": 10**6, "sinks": 0}, "softmax"),),
    forms=("impl", ("dense", "sdpa", "tiled")),
)
