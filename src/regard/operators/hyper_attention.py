r"""HyperAttention: large weights are found by hashing, the rest of the row is estimated from a few
keys drawn at random.

    o_i = (sum_{j in block of i} e_ij v_j + M/m sum_{drawn j outside it} e_ij v_j) / (the same of 1)

q (B,H,N,D), k (B,H_k,M,D), v (B,H_v,M,E), e_ij = exp(q_i . k_j s), s = 1/sqrt(D). Keys are sorted
by their angular bucket and cut into blocks of `block`; m = `samples` of them are drawn with
replacement. A query's block is the one of its rank among the sorted queries; in a causal call, the
one in the middle of its bucket, since ranks would tell of later queries. Row sums are unbiased,
given the blocks.

A causal call is cut in halves: each attends causally to itself, by the same rule, and the second to
the first as above. Up to `exact_below` tokens nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Golden, Limit, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.recurrent import is_causal
from regard.core.scored import Impl
from regard.core.weights import repeat_heads, scale_of
from regard.importance.angular_hash import AngularHash, angular_hash
from regard.importance.drawn import drawn
from regard.operators.hashed_blocks import Rule, approximate, causal_halves


def hyper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    block: int = 256,
    samples: int = 256,
    exact_below: int = 4096,
    projections: int = 7,
    seed: int = 0,
    impl: Impl = "auto",
) -> Result:
    """Approximate softmax attention. projections: bits of a bucket. seed: of directions and draws,
    which differ between layers.

    Raises:
        UnsupportedError: a mask other than Causal(), or causal cross attention.
    """
    check_qkv(q, k, v, call)
    if block < 1 or samples < 0 or exact_below < 1 or not 1 <= projections <= 16:
        got = (block, samples, exact_below, projections)
        raise ArgumentError("block, samples, exact_below, projections", "positive, at most 16", got)
    causal = is_causal(call, "hyper_attention")
    if causal and q.shape[2] != k.shape[2]:
        raise UnsupportedError("hyper_attention", "causal queries must be the keys' own tokens")
    seed = 2 * (seed * 4096 + call.layer)
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])

    def draw(branch: int, heads: int, keys: int) -> Tensor:
        table = drawn((seed + 1) * 4099 + branch, heads * samples, q.device)
        return (table * keys).long().view(1, heads, samples)

    rule = Rule(
        angular_hash(q.shape[-1], projections, seed, q.device),
        draw,
        block,
        samples,
        exact_below,
        not causal,
        scale_of(call, None, q.shape[-1]),
        impl,
    )
    run = causal_halves if causal else approximate
    if call.padding is None and call.query_padding is None:
        return Result(run(q, k, v, rule).output)
    if causal or q.shape[2] == k.shape[2]:
        call = call.of_self()
    return Result(_row_by_row(lambda a, b, c: run(a, b, c, rule).output, (q, k, v), call))


def _row_by_row(run: Callable[..., Tensor], qkv: tuple[Tensor, ...], call: Call) -> Tensor:
    """Each sequence without its padding, since halves and blocks depend on its length."""
    n, rows = qkv[0].shape[2], []
    for row in range(qkv[0].shape[0]):
        own, theirs = (
            torch.arange(length, device=qkv[0].device)
            if real is None
            else real[row].nonzero()[:, 0]
            for real, length in ((call.query_padding, n), (call.padding, qkv[1].shape[2]))
        )
        q, k, v = (
            x[row : row + 1].index_select(2, kept)
            for x, kept in zip(qkv, (own, theirs, theirs), strict=True)
        )
        empty = q.new_zeros(1, q.shape[1], n, v.shape[-1])
        rows.append(empty.index_copy(2, own, run(q, k, v)))
    return torch.cat(rows)


def _replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    config, inputs, state = case["config"], case["inputs"], case["state_dict"]
    q, k, v = (inputs[name] for name in "qkv")
    hashing, drawn_sets = AngularHash(state["proj_dir"][0, 0], state["perm"]), []
    drawn_sets += inputs.get("sampled_sets", [])
    rule = Rule(
        hashing,
        lambda branch, heads, keys: drawn_sets.pop(0),
        config["block_size"],
        config["sample_size"],
        config["min_seq_len"],
        True,
        q.shape[-1] ** -0.5,
        published=True,
    )
    found = (causal_halves if config["causal"] else approximate)(q, k, v, rule)
    return {
        "out": found.output,
        "lse": found.row_lse[..., None],
        "q_hash": hashing.buckets(q),
        "k_hash": hashing.buckets(k),
    }


HYPER_ATTENTION = Card(
    name="hyper_attention",
    kind="operator",
    build=hyper_attention,
    papers=(
        Paper("2310.05869", "HyperAttention: Long-context Attention in Near-Linear Time", 2023),
    ),
    family="selected",
    patterns=("noncausal self", "causal self", "noncausal cross"),
    cost=Cost(time=1, state="none"),
    claim=Claim(
        "its error falls as more keys are drawn, at a cost that grows with N alone",
        "regard compare --mechanisms 'softmax,hyper_attention(block=8,samples=8,exact_below=16)'",
    ),
    example=Example(
        length=13, options={"block": 3, "samples": 4, "exact_below": 4, "projections": 3}
    ),
    limits=(
        Limit({"exact_below": 10**6}, "softmax"),
        Limit({"block": 10**6, "samples": 0}, "softmax"),
    ),
    forms=("impl", ("dense", "tiled")),
    goldens=(
        Golden(
            "193_hyperattention.pt",
            _replay,
            "insuhan/hyper-attn:models/attention/hyper_attn.py:HyperAttention",
            "68b91e9b95",
        ),
    ),
    gaps={"cost": "N log N in causal calls: at the lengths counted, an exponent of 1.4"},
    deviations=(
        "the authors' code also counts the zeros that fill the last block of keys",
        "the authors' code counts drawn keys of the own block a second time",
        "buckets stand in Gray order; in the authors' some neighbours differ in several bits",
        "in causal calls a query's block does not depend on other queries; the authors rank them",
    ),
)
