r"""HiP: a block of queries reads the keys that a tree search finds, the first ones and the nearest.

    C_t = tree_search(queries of block t, keys before their window)        `keep` keys, in blocks
    o_i = softmax attention of q_i over C_t(i), the first `sinks` keys and the last `window` ones

q (B,H,N,D), k (B,H_k,M,D), v (B,H_v,M,E); each query head searches for itself, at O(keep log M) per
block of queries. Up to `keep` keys before the window, all are read. Queries are blocked by their
positions, and the window is that of the block's first query. Few of many keys are gathered;
otherwise the others are hidden.

With query_block > 1, as published, the queries of a block choose together, so that an output
depends on the queries after it in its block, though on no later key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Golden, Limit, Paper
from regard.core.errors import UnsupportedError
from regard.core.recurrent import is_causal
from regard.core.scored import without_padding
from regard.core.selected import Choice, Impl, Selected, attend_chosen
from regard.core.sequence import in_sequence
from regard.importance.query_blocks import query_blocks
from regard.importance.query_tree import Tree
from regard.importance.tree_search import Representative, holds

GATHERED = 4
"""Keys are gathered where a block of queries reads at most one in this many."""


def hip(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    keep: int = 512,
    block: int = 2,
    query_block: int | tuple[int, int] = 1,
    window: int = 256,
    sinks: int = 16,
    representative: Representative = "center",
) -> Result:
    """Hierarchically pruned attention; options as in `regard.importance.query_tree.Tree`.

    Raises:
        UnsupportedError: a mask other than Causal(): the tree would find hidden keys.
    """
    check_qkv(q, k, v, call)
    tree = Tree(keep, block, query_block, window, sinks, representative)
    if not is_causal(call, "hip"):
        raise UnsupportedError("hip", "it is causal; call.mask must be Causal()")
    q, k, v = without_padding(q, k, v, call)
    sequence = in_sequence(call, q, k)
    k, v = sequence.alignment.front(k), sequence.alignment.front(v)
    queries = sequence.queries.expand(len(q), -1)
    blocks = query_blocks(queries, _real_queries(call, q), tree.size)
    reach = blocks.greatest(sequence.reach.expand(len(q), -1), 0)
    first = -blocks.greatest(-sequence.reach.expand(len(q), -1), -k.shape[2])
    read = keys_read(tree, tree.find(q, k, blocks, reach), first, reach, k.shape[2])
    room = -k.shape[2] % block
    ordered = call.but(
        grid=None,
        padding=F.pad(sequence.alignment.padding.expand(len(q), -1), (0, room)),
        query_padding=blocks.there,
        query_positions=queries.gather(1, blocks.rows),
        key_positions=F.pad(sequence.keys, (0, room)),
    )
    laid = blocks.cut(q).flatten(2, 3)
    k, v = F.pad(k, (0, 0, 0, room)), F.pad(v, (0, 0, 0, room))
    few = read.index.shape[-1] * GATHERED <= k.shape[2]
    method = Selected(q.new_empty(0), keep, query_tile=tree.size)  # no ranking: it is done
    impl: Impl = "gathered" if few else "masked"
    result = attend_chosen(laid, k, v, ordered, method, read, impl=impl)
    return Result(blocks.back(result.output))


def _real_queries(call: Call, q: Tensor) -> Tensor | None:
    """Which queries (B,N) are real: those of the last keys, unless the call says otherwise."""
    if call.query_padding is not None or call.padding is None:
        return call.query_padding
    return call.padding[:, -q.shape[2] :] if 0 < q.shape[2] <= call.padding.shape[1] else None


def keys_read(tree: Tree, found: Choice, first: Tensor, reach: Tensor, count: int) -> Choice:
    """Keys each block of queries reads, each once, (B,H,T,w): blocks found, sinks, and the window
    of its first query and what follows; first, reach (B,T): keys its first and last query may see,
    of `count`.
    """
    span = min(tree.size + tree.window - 1, count) if tree.window else 0
    sinks = torch.arange(min(tree.sinks, count), device=reach.device).expand(*reach.shape, -1)
    near = reach[..., None] - span + torch.arange(span, device=reach.device)
    least = (first - tree.window).clamp_min(tree.sinks)[..., None]
    fits = torch.cat([sinks < reach[..., None], near >= least], -1)[:, None]
    besides = torch.cat([sinks, near.clamp_min(0)], -1)[:, None]
    fits = fits & ~holds(found, besides // tree.block)
    tokens = found.index[..., None] * tree.block + torch.arange(tree.block, device=reach.device)
    valid = found.valid.repeat_interleave(tree.block, -1)
    return Choice(
        torch.cat([tokens.flatten(-2), besides.expand_as(fits)], -1), torch.cat([valid, fits], -1)
    )


def replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The draft's kept blocks of one golden case, by their first keys, and how many count; every
    second query searches, an interval is judged by its first block.
    """
    config, q, k = case["config"], case["inputs"]["q"][None], case["inputs"]["k"][None]
    tree = Tree(
        keep=config["mask_k"],
        block=config["block_size_k"],
        query_block=(config["block_size_q"], 2),
        window=config["sliding_window"],
        representative="first",
    )
    blocks = query_blocks(torch.arange(q.shape[2])[None], None, tree.size)
    reach = blocks.greatest(torch.arange(1, q.shape[2] + 1)[None], 0)
    choice = tree.find(q, k, blocks, reach + k.shape[2] - q.shape[2])
    count = -(-q.shape[2] // tree.size)
    found, valid = choice.index[0, :, :count] * tree.block, choice.valid[0, :, :count]
    width = -(-tree.keep // tree.block)
    if found.shape[-1] < width:  # fewer keys than are wanted: the draft lists them and counts on
        found = (torch.arange(width) * tree.block).expand(*found.shape[:-1], -1)
    return {"indices": found, "ks": valid.sum(-1)}


HIP = Card(
    name="hip",
    kind="operator",
    build=hip,
    papers=(
        Paper(
            "2406.09827",
            "A Training-free Sub-quadratic Cost Transformer Model Serving Framework With "
            "Hierarchically Pruned Attention",
            2024,
        ),
    ),
    family="selected",
    patterns=("causal self",),
    cost=Cost(time=1, state="keys"),
    claim=Claim(
        "finds the keys a query wants without scoring them all, where scores are smooth",
        "regard compare --mechanisms "
        '"softmax,sliding_window(window=16,sinks=0),hip(keep=16,window=8,sinks=1)"',
    ),
    example=Example(length=14, options={"keep": 2, "block": 2, "window": 2, "sinks": 1}),
    limits=(
        Limit({"keep": 10**6}, "softmax"),
        Limit({"keep": 2, "window": 10**6}, "softmax"),
    ),
    goldens=(
        Golden(
            "171_hip_draft_mask.pt",
            replay,
            "https://github.com/DeepAuto-AI/hip-attention",
            "fea42c7792",
        ),
    ),
)
