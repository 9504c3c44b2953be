r"""S2-Attention: every head sees its local blocks and its own shard of the rest, one of every
`stride` key blocks, so that the heads together see the whole context.

    o_i^h = sum_{j visible to i in h} softmax_j(q_i^h . k_j^h s) v_j^h
    visible: -right < i // b - j // b < left, or (j // b + p_h step + offset) mod stride = 0

q: (B,H,N,D)  k: (B,H_k,M,D)  v: (B,H_v,M,E); p_h numbers the pattern of head h. Where the call is
causal, stripes stand at absolute blocks, so that a block once dropped from a cache is never needed
again; otherwise they stand at distances from the query.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Golden, Limit, Paper
from regard.core.frame import Frame
from regard.core.mask import Causal, Mask
from regard.core.scored import Impl, attend
from regard.core.weights import Scored
from regard.masks.future import hides_future
from regard.masks.shards import Shards


def shards(
    block: int = 64,
    local: int | tuple[int, int] = 16,
    stride: int = 8,
    pattern_heads: int | None = None,
    dense_heads: int = 0,
) -> Mask:
    """The mechanism's mask for causal calls."""
    return Shards(block, local, stride, pattern_heads, dense_heads)


def s2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    block: int = 64,
    local: int | tuple[int, int] = 16,
    stride: int = 8,
    pattern_heads: int | None = None,
    dense_heads: int = 0,
    impl: Impl = "auto",
) -> Result:
    """Attention in shards; the options are those of `Shards`, which has more. With grouped heads,
    pattern_heads = key heads lets a group share its pattern.
    """
    check_qkv(q, k, v, call)
    relative = not hides_future(call.mask)
    mask = Shards(block, local, stride, pattern_heads, dense_heads, relative=relative)
    return attend(q, k, v, call, Scored(mask=mask), impl=impl)


def _replay(case: Mapping[str, Any]) -> dict[str, Any]:
    config = case["config"]
    block, causal = config.get("block_size", 64), config.get("causal", True)
    kind = config.get("vert_position_type") or ("absolute" if causal else "relative")
    local = config.get("local_blocks", 4)
    mask: Mask = Shards(
        block,
        tuple(local) if isinstance(local, list) else local,
        config.get("vert_stride", 4),
        config.get("num_kv_heads"),
        config.get("num_dense_heads", 0),
        0 if config.get("homo_head") else config.get("head_sliding_step"),
        config.get("head_sliding_offset", 0),
        kind == "relative",
    )
    mask = Causal() & mask if causal else mask
    past = config.get("past_len") or 0
    queries = torch.arange(config["seqlen"])[None]
    keys = torch.arange(config.get("kv_seqlen") or config["seqlen"])[None]
    # the authors' chunks begin at a block boundary; their dense mask begins at the first new token
    whole = Frame(1, config["num_heads"], queries[:, -(-past // block) * block :], keys)
    new = Frame(1, config["num_heads"], queries[:, past:], keys)
    return {"block_mask": mask.blocks(whole, block).some[0], "dense_mask": mask.dense(new)[0]}


S2_ATTENTION = Card(
    name="s2_attention",
    kind="operator",
    build=s2_attention,
    papers=(
        Paper(
            "2407.17678",
            "S2-Attention: Hardware-Aware Context Sharding Among Attention Heads",
            2024,
        ),
    ),
    family="scored",
    patterns=("noncausal self", "causal self"),
    cost=Cost(time=2, state="keys"),
    claim=Claim(
        "heads that each see a shard recall like heads that see all",
        "regard compare --task recall --mechanisms "
        "'softmax,s2_attention(block=4,local=1,stride=4)'",
    ),
    mask=shards,
    example=Example(options={"block": 2, "local": 1, "stride": 3}),
    limits=(Limit({"stride": 1}, "softmax"), Limit({"dense_heads": 4}, "softmax")),
    forms=("impl", ("dense", "sdpa", "tiled")),
    goldens=(
        Golden(
            "155_s2_local_stride_masks.pt",
            _replay,
            "linxihui/dkernel:dkernel/utils.py:get_sparse_attn_mask",
            "0d4e90e4ea",
        ),
    ),
)
