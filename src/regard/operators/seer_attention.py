r"""SeerAttention: a learned gate on pooled blocks of queries and keys predicts which blocks to
read.

    P = softmax over blocks b <= a of G_ab        G: the gate, see features/block_gate.py
    o_i = softmax over keys of the chosen blocks of q_i . k_j s, times v_j

q (B,H,N,D), k (B,H_k,N,D), v (B,H_v,N,E), s = 1/sqrt(D). Chosen are blocks with P above `threshold`
or, with `density`, the top 1 - sqrt(1 - density) of a row's blocks, which is that fraction of the
causal triangle; the own block always, and every block in the last `dense_rows` rows. The output has
no gradient for the gate: it learns from block maxima of full attention (recipes/seer_gate.py), and
its logits are left as the note "block_gate".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Golden, Limit, Paper
from regard.core.errors import UnsupportedError
from regard.core.recurrent import is_causal
from regard.core.scored import Impl, attend, without_padding
from regard.core.sequence import in_sequence
from regard.core.weights import Scored
from regard.features.block_gate import BlockGate, Pool
from regard.importance.gated_blocks import check_budget, chosen_blocks, gate_logits
from regard.masks.blocks import Blocks


class SeerAttention(nn.Module):
    """Block-sparse causal attention under a learned gate. threshold, density: exactly one. rope:
    base of rotary positions for the pooled vectors, where q and k come without; None: q and k are
    pooled as they come. block, queries, keys: of the gate.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        block: int = 64,
        threshold: float | None = None,
        density: float | None = None,
        dense_rows: int = 2,
        rope: float | None = None,
        queries: tuple[Pool, ...] = ("avg",),
        keys: tuple[Pool, ...] = ("max", "min", "avg"),
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        if threshold is None and density is None:
            threshold = 1e-3
        check_budget(threshold, density, dense_rows)
        self.threshold, self.density, self.dense_rows = threshold, density, dense_rows
        self.rope = rope
        self.impl: Impl = impl
        self.gate = BlockGate(heads, head_dim, block=block, queries=queries, keys=keys)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Output (B,H,N,E)."""
        check_qkv(q, k, v, call)
        if not is_causal(call, "seer_attention") or q.shape[2] != k.shape[2]:
            raise UnsupportedError("seer_attention", "it is causal self-attention only")
        call = call.of_self()
        q, k, v = without_padding(q, k, v, call)
        if not q.shape[2]:
            return Result(q.new_zeros(*q.shape[:3], v.shape[-1]))
        logits, count = gate_logits(self.gate, q, k, call, rope=self.rope)
        call.note("block_gate", logits)
        keep = chosen_blocks(
            logits.detach().softmax(-1),
            count,
            threshold=self.threshold,
            density=self.density,
            dense_rows=self.dense_rows,
        )
        sequence = in_sequence(call, q, k)
        keys, values = (sequence.alignment.front(x) for x in (k, v))
        placed = call.but(
            padding=None if call.padding is None else sequence.alignment.padding,
            query_positions=sequence.reach - 1,
            key_positions=torch.arange(k.shape[2], device=q.device),
        )
        method = Scored(mask=Blocks(keep, self.gate.block))
        return attend(q, keys, values, placed, method, impl=self.impl)


def authors_gate(config: Mapping[str, Any], state: Mapping[str, Any]) -> BlockGate:
    """The gate with the authors' weights. `gate_type` names its poolings: Qavg_Kmaxminavg."""
    queries, keys = (re.findall("max|min|avg", part) for part in config["gate_type"].split("_")[:2])
    gate = BlockGate(
        config["num_q_head"],
        config["head_dim"],
        kv_heads=config["num_k_head"],
        block=config["block_size"],
        width=config["gate_hidden"],
        queries=queries,
        keys=keys,
        map_queries="mask_linear_q.weight" in state,
    ).to(state["mask_linear_k.weight"])
    names = {"k_maps": "mask_linear_k.weight", "q_maps": "mask_linear_q.weight"}
    gate.load_state_dict({own: state[names[own]] for own in gate.state_dict()})
    return gate


def _replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    config, inputs = case["config"], case["inputs"]
    q, k = (inputs[name].transpose(1, 2) for name in "qk")
    gate = authors_gate(config, case["state_dict"])
    half = inputs["cos"].shape[-1] // 2
    angles = torch.atan2(inputs["sin"], inputs["cos"])[:, None, :, :half]
    fringe = -k.shape[2] % gate.block
    real = F.pad(torch.ones(1, k.shape[2], dtype=torch.bool), (0, fringe))
    with torch.no_grad():
        logits = gate(*(F.pad(x, (0, 0, 0, fringe)) for x in (q, k)), real, angles)
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    logits = logits.masked_fill(future, -1e9)
    weights, count = logits.softmax(-1), torch.tensor([logits.shape[-1]])
    dense = 2 if config["last_block_dense"] else 0
    budgets = {
        "mask_threshold": (config["threshold"], None),
        "mask_nz_ratio": (None, config["nz_ratio"]),
    }
    masks = {
        name: chosen_blocks(weights, count, threshold=a, density=b, dense_rows=dense, own=False)
        for name, (a, b) in budgets.items()
    }
    return {"gate_prob": weights, "gate_logits": logits, **masks}


SEER_ATTENTION = Card(
    name="seer_attention",
    kind="operator",
    build=SeerAttention,
    papers=(
        Paper(
            "2410.13276",
            "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
            2024,
        ),
    ),
    family="selected",
    patterns=("causal self",),
    cost=Cost(time=2, state="none"),
    claim=Claim(
        "a trained gate finds the blocks that full attention weighs most",
        "regard show seer_attention",
    ),
    example=Example(length=13, options={"block": 3, "density": 0.4, "dense_rows": 1}),
    limits=(
        Limit({"threshold": -1.0, "density": None}, "softmax"),
        Limit({"density": 1.0}, "softmax"),
    ),
    forms=("impl", ("dense", "sdpa", "tiled")),
    goldens=(
        Golden(
            "195_seerattention_gate.pt",
            _replay,
            "microsoft/SeerAttention:seer_attn/prefill_sparse/attn_gate.py:AttnGate",
            "aba03e3f2c",
        ),
    ),
    convert=authors_gate,
    gaps={
        "future_invisible": "a block of queries chooses its keys together, its last query included",
    },
    deviations=(
        "a block always reads itself; the authors may leave a row of blocks empty",
        "within an attention layer with rotary positions the gate pools keys that are turned",
        "the decoding gate of a later paper is left out: decoding is dense",
    ),
)
