r"""Shifted groups (S2-Attn, SF-Attn): softmax attention within groups of tokens, some heads' groups
shifted by half a group, and the first tokens visible to all.

    o_i^h = sum_{j visible to i in h} softmax_j(q_i^h . k_j^h s) v_j^h
    visible: group_h(i) = group_h(j)  or  j < sinks;  causal

q (B,H,N,D), k (B,H_k,M,D), v (B,H_v,M,E); the groups are those of `ShiftedGroups`. A mask for
fine-tuning on long text: half of the heads shifted is S2-Attn, a quarter and four sinks SF-Attn,
which is the default. Heads are never rolled, so nothing sees the future; `wrap=True` is the
published code, in which the first tokens of the shifted heads see the last ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Golden, Limit, Paper
from regard.core.errors import UnsupportedError
from regard.core.mask import Causal, Mask
from regard.core.recurrent import is_causal
from regard.core.scored import Impl, attend
from regard.core.weights import Scored
from regard.masks.shifted_groups import ShiftedGroups
from regard.masks.sinks import Sinks


def groups_and_sinks(
    group: int = 2048, shifted: float = 0.25, sinks: int = 4, wrap: bool = False
) -> Mask:
    """The mechanism's mask, in conjunction with the call's."""
    mask = ShiftedGroups(group, shifted, wrap)
    return mask | Sinks(sinks) if sinks else mask


def shifted_groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    group: int = 2048,
    shifted: float = 0.25,
    sinks: int = 4,
    wrap: bool = False,
    impl: Impl = "auto",
) -> Result:
    """Attention in groups of `group` tokens. shifted: fraction of the heads, the last ones, whose
    groups begin half a group later. sinks: first tokens that all see. wrap: see the module.

    Raises:
        UnsupportedError: a call that is not causal.
    """
    check_qkv(q, k, v, call)
    if not is_causal(call, "shifted_groups"):
        raise UnsupportedError("shifted_groups", "its groups are those of a causal model")
    call = call.but(mask=None) if wrap else call  # rolled heads bring their own order
    mask = groups_and_sinks(group, shifted, sinks, wrap)
    return attend(q, k, v, call, Scored(mask=mask), impl=impl)


def _replay(case: Mapping[str, Any]) -> dict[str, Any]:
    config, state, x = case["config"], case["state_dict"], case["inputs"]["x"]
    heads, kv_heads = config["H"], config["KV"]
    q, k, v = (
        F.linear(x, state[f"{name}_proj.weight"]).unflatten(-1, (count, -1)).transpose(1, 2)
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    call = Call(mask=Causal())
    o = shifted_groups(
        q, k, v, call, group=config["group_size"], shifted=0.5, sinks=0, wrap=True
    ).output
    return {"y": F.linear(o.transpose(1, 2).flatten(2), state["o_proj.weight"])}


SHIFTED_GROUPS = Card(
    name="shifted_groups",
    kind="operator",
    build=shifted_groups,
    papers=(
        Paper(
            "2406.05678",
            "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language "
            "Models",
            2024,
        ),
    ),
    family="scored",
    patterns=("causal self",),
    cost=Cost(time=1, state="constant"),
    claim=Claim(
        "half of the heads shifted by half a group joins the groups: recall across them comes back",
        "regard compare --task recall --mechanisms "
        "'softmax,shifted_groups(group=8,shifted=0.5,sinks=0),shifted_groups(group=8,shifted=0)'",
    ),
    mask=groups_and_sinks,
    example=Example(options={"group": 4, "shifted": 0.5, "sinks": 1}),
    limits=(
        Limit({"group": 100_000, "shifted": 0.0}, "softmax"),
        Limit({"group": 2, "shifted": 0.0, "sinks": 100_000}, "softmax"),
    ),
    forms=("impl", ("dense", "sdpa", "tiled")),
    goldens=(
        Golden(
            "6_s2attn_longlora.pt",
            _replay,
            "https://github.com/dvlab-research/LongLoRA",
            "d4eb344c5c",
            leaves={"attn_grouped": "our weights are not cut into groups; y rests on them"},
        ),
    ),
    deviations=(
        "which heads of SF-Attn stay in place is read from a description: a quarter is shifted",
    ),
)
