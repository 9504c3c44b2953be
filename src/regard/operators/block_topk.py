r"""Block top-k attention: keys stand in blocks, and a query reads only the blocks whose mean key it
likes best.

    S_ic = q_i . mean of the keys of block c        C_i = the `keep` blocks of largest S_ic
    o_i = sum_j softmax_j(q_i . k_j s) v_j over the visible keys j of blocks in C_i

q (B,H,N,D), k (B,H_k,M,D), v (B,H_v,M,E), s = 1/sqrt(D); blocks of `block` keys are counted in
sequence order. Under a causal mask the query's own block is always among them, whatever its mean,
and earlier blocks are complete, so nothing later has a say. The choice has no gradient and no
parameters: queries learn to like the blocks they need because they read them.
"""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Limit, Paper
from regard.core.errors import ArgumentError
from regard.core.recurrent import is_causal
from regard.core.scored import without_padding
from regard.core.selected import Impl, Selected, select
from regard.core.sequence import in_sequence
from regard.importance.block_means import block_scores


def block_topk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    block: int = 64,
    keep: int = 8,
    impl: Impl = "masked",
) -> Result:
    """Softmax attention within the `keep` best blocks of `block` keys.

    Raises:
        UnsupportedError: a mask other than Causal(): the mean of a block would tell of hidden keys.
    """
    check_qkv(q, k, v, call)
    if block < 1 or keep < 1:
        raise ArgumentError("block, keep", "at least 1 each", (block, keep))
    causal = is_causal(call, "block_topk")
    q, k, v = without_padding(q, k, v, call)
    sequence = in_sequence(call, q, k)
    fringe = -k.shape[2] % block
    k, v = (F.pad(sequence.alignment.front(x), (0, 0, 0, fringe)) for x in (k, v))
    real = F.pad(sequence.alignment.padding, (0, fringe))
    importance = block_scores(q.detach(), k.detach(), real, block)
    if causal:
        own = (sequence.reach - 1).div(block, rounding_mode="floor")[:, None, :, None]
        number = torch.arange(importance.shape[-1], device=q.device)
        importance = importance.masked_fill(number == own, float("inf"))
    ordered = call.but(
        grid=None,
        padding=real.expand(q.shape[0], -1),
        query_positions=sequence.queries,
        key_positions=F.pad(sequence.keys, (0, fringe)),
    )
    return select(q, k, v, ordered, Selected(importance, keep, key_tile=block), impl=impl)


BLOCK_TOPK = Card(
    name="block_topk",
    kind="operator",
    build=block_topk,
    papers=(Paper("2502.13189", "MoBA: Mixture of Block Attention for Long-Context LLMs", 2025),),
    family="selected",
    patterns=("noncausal self", "causal self", "noncausal cross", "causal cross"),
    cost=Cost(time=2, state="keys"),
    claim=Claim(
        "recalls most of what softmax does from a quarter of the keys; a window of them does not",
        "regard compare --mechanisms "
        '"softmax,sliding_window(window=16,sinks=0),block_topk(block=4,keep=4)"',
    ),
    example=Example(options={"keep": 2}, sized=lambda size: {"block": isqrt(size[0])}),
    limits=(Limit({"keep": 10**6}, "softmax"),),
    forms=("impl", ("masked", "gathered")),
)
