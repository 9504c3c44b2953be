r"""Pyramid sparse attention: what matters less is read more coarsely, as means of 2, 4 or 8
neighbouring keys, before it is not read at all.

    o_i = sum_p softmax_p(q_i . k_p s + log c_p) v_p        p: keys and means of c_p keys

q (B,H,N,D), k (B,H_k,N,D), v (B,H_v,N,E), s = 1/sqrt(D). Keys stand in blocks of `block`; a block
of queries reads block b as means of f_ab keys, f in {1, 2, 4, 8}, or skips it. A mean stands for
its c keys, which log c says; one softmax runs over all. f comes from the importance S_ab of blocks
(a few sampled queries and keys of each) by cumulative share, `thresholds`; with `similarity`, f is
no larger than keys are alike inside the block. Where keys and values do not differ inside groups,
the result is softmax attention whatever f.

Causal calls read their own block as it is, and earlier ones are complete, so means tell of nothing
later; the first query of a block chooses for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Golden, Limit, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mask import Causal
from regard.core.recurrent import is_causal
from regard.core.scored import Impl, attend, without_padding
from regard.core.sequence import in_sequence
from regard.core.weights import Scored, repeat_heads, scale_of
from regard.importance.block_means import mean_keys
from regard.importance.pyramid import FACTORS, Rule, pooling_factors, similarity_cap
from regard.importance.sampled_blocks import sampled_importance
from regard.masks.blocks import Blocks


def pyramid_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    block: int = 128,
    thresholds: tuple[float, float, float, float] = (0.5, 0.6, 0.7, 0.8),
    rule: Rule = "mass",
    similarity: tuple[float, float, float] | None = None,
    samples: int = 32,
    impl: Impl = "auto",
) -> Result:
    """Self-attention on a pyramid of keys. thresholds: shares of importance (rule "rank": of the
    number of blocks) up to which blocks are read at factor 1, 2, 4, 8. similarity: least mean
    cosine for factors 2, 4, 8. samples: queries and keys of each block that judge it.

    Raises:
        UnsupportedError: not self-attention, or a mask other than Causal().
    """
    check_qkv(q, k, v, call)
    if block < 1 or block % FACTORS[-1] or samples < 1:
        raise ArgumentError("block, samples", "multiples of 8 and at least 1", (block, samples))
    if list(thresholds) != sorted(thresholds) or len(thresholds) != len(FACTORS):
        raise ArgumentError("thresholds", "four rising fractions", thresholds)
    causal = is_causal(call, "pyramid_sparse")
    if q.shape[2] != k.shape[2]:
        raise UnsupportedError("pyramid_sparse", "queries must be the keys' own tokens")
    call = call.of_self()
    q, k, v = without_padding(q, k, v, call)
    if not q.shape[2]:
        return Result(q.new_zeros(*q.shape[:3], v.shape[-1]))
    sequence, fringe = in_sequence(call, q, k), (0, 0, 0, -k.shape[2] % block)
    front = [F.pad(sequence.alignment.front(x), fringe) for x in (q, k, v)]
    real = F.pad(sequence.alignment.padding, (0, fringe[3]))
    asking, asked = front[0].detach(), front[1].detach()
    scale = scale_of(call, None, q.shape[-1])
    importance = sampled_importance(asking, asked, real, block, samples, scale, causal=causal)
    allowed = real.unflatten(1, (-1, block)).any(-1)[:, None, None]
    number = torch.arange(allowed.shape[-1], device=q.device)
    if causal:
        allowed = allowed & (number < number[:, None])
    factors = pooling_factors(importance, allowed, thresholds, rule=rule)
    if similarity is not None:
        cap = repeat_heads(similarity_cap(asked, real, block, similarity), q.shape[1])
        factors = torch.minimum(factors, cap[:, :, None])
    if causal:
        factors = torch.where(number == number[:, None], 1, factors)
    places = call.but(query_positions=sequence.reach - 1)
    return on_pyramid(q, front[1], front[2], places, factors, real, block, impl)


def on_pyramid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    factors: Tensor,
    real: Tensor,
    block: int,
    impl: Impl = "auto",
) -> Result:
    """Attention under given factors (B or 1, H or 1, nq, nk) of q (B,H,N,D), at the places that
    call.query_positions says, with k (B,H_k,nk*block,D) and v, of which `real` (B or 1, ·) count.
    """
    pad, count = factors.shape[-1] * block, [real.unflatten(1, (-1, f)).sum(-1) for f in FACTORS]
    keys, values = (torch.cat([mean_keys(x, real, f) for f in FACTORS], 2) for x in (k, v))
    stands_for = torch.cat(count, 1)  # (B or 1, M')
    # level after level on one axis of positions, so that whole blocks are the unit of the mask
    positions = [pad * i + torch.arange(0, pad, f, device=q.device) for i, f in enumerate(FACTORS)]
    chart = torch.cat([factors == f for f in FACTORS], -1)
    fine = torch.arange(chart.shape[-1], device=q.device) < factors.shape[-1]
    near, far = Blocks(chart & fine, block), Blocks(chart & ~fine, block)
    inner = call.but(
        mask=near & Causal() | far if call.mask == Causal() else near | far,
        padding=(stands_for > 0).expand(q.shape[0], -1),
        key_positions=torch.cat(positions),
        grid=None,
    )
    bias = stands_for.clamp_min(1).to(q.dtype).log()[:, None]
    return attend(q, keys, values, inner, Scored(key_bias=bias), impl=impl)


def _replay(case: Mapping[str, Any]) -> dict[str, Any]:
    config, inputs = case["config"], case["inputs"]
    q, k, v = (inputs[name] for name in "qkv")
    importance, block = inputs["pooled_importance"], config["block"]
    every = torch.ones(1, dtype=torch.bool)
    real = torch.ones(1, k.shape[2], dtype=torch.bool)
    ends = [config["mask_ratios"][f][1] for f in FACTORS]
    masks = {}
    for name in case["outputs"]["code_masks"]:  # such as "('topk', 128, 32)"
        mode, size, tile = name.strip("()").replace("'", "").split(", ")
        masks[name] = pooling_factors(
            importance,
            every,
            ends,
            rule="rank" if mode == "topk" else "mass",
            least=0.0 if mode == "topk" else config["min_full_attn_ratio"],
            multiples=[max(1, math.ceil(f / (int(size) // int(tile)))) for f in FACTORS],
        )
    factors = pooling_factors(importance, every, config["thresholds_paper"], inclusive=False)
    alike = [config["sim"][f"sim_{f}x_threshold"] for f in FACTORS[1:]]
    return {
        "code_masks": masks,
        "paper_level_mask": (2 * factors).clamp_min(1).log2().long(),
        "out_with_paper_mask": on_pyramid(
            q, k, v, Call(query_positions=torch.arange(q.shape[2])), factors, real, block
        ).output,
        "k_similarity": similarity_cap(k, real, block, alike),
    }


PYRAMID_SPARSE = Card(
    name="pyramid_sparse",
    kind="operator",
    build=pyramid_sparse,
    papers=(
        Paper(
            "2512.04025",
            "PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation",
            2025,
        ),
    ),
    family="pooled",
    patterns=("noncausal self", "causal self"),
    cost=Cost(time=2, state="none"),
    claim=Claim(
        "at one density, coarse reading of the rest errs less than leaving it out",
        "regard compare --mechanisms 'softmax,pyramid_sparse(block=8)'",
    ),
    example=Example(
        length=21, options={"block": 8, "samples": 4, "thresholds": (0.3, 0.5, 0.7, 0.9)}
    ),
    limits=(Limit({"thresholds": (1.0, 1.0, 1.0, 1.0)}, "softmax"),),
    forms=("impl", ("dense", "sdpa", "tiled")),
    goldens=(
        Golden(
            "214_psa.pt",
            _replay,
            "ziplab/Pyramid-Sparse-Attention:src/psa_triton/utils/transfer_attn_to_mask.py",
            "be122cfb7f",
        ),
    ),
    deviations=(
        "samples stand at regular offsets, not random ones",
        "in a causal call the first query of a block chooses for it: the others know its future",
        "a ragged last block averages the tokens there are; the authors repeat the last one",
        "the antidiagonal score of blocks and the space-filling order of video are left out",
    ),
)
