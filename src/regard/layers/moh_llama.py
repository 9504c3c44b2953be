r"""Mixture-of-Head attention with a parameter-free router, for pretrained language models: a routed
head speaks where its query is long.

    u_ih = |q_ih|  over routed heads h        r_i = softmax_h(u_ih / std_h(u_ih))
    y_i = W_o concat_h(g_ih o_ih)             g = 1 for shared and the K largest r, else 0

q: (B,H,N,D) before rotation; heads 0..S-1 are shared. In training mode the gates of chosen heads
pass their gradient straight through to r. `call.notes` receives "gates" and "balance_loss".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.card import Card, Claim, Cost, Example, Golden, Limit
from regard.features.rotary import Style
from regard.layers.attention import Attention, split_heads
from regard.layers.moh import MOH, gated, head_counts, note_balance, strongest


def query_norms(q: Tensor, shared: int) -> Tensor:
    """Lengths (B,N,H - shared) of the routed heads' queries, q (B,H,N,D)."""
    return q[:, shared:].norm(dim=-1).transpose(1, 2)


def router_share(norms: Tensor) -> Tensor:
    """Softmax over heads of lengths (B,N,E) over their standard deviation."""
    apart = norms - norms.mean(-1, keepdim=True)
    variance = apart.square().sum(-1, keepdim=True) / max(1, norms.shape[-1] - 1)
    tiny = torch.finfo(norms.dtype).tiny  # equal lengths have no spread
    return (norms / variance.clamp_min(tiny).sqrt()).softmax(-1)


class MoHLlama(Attention):
    """Softmax attention whose gates, 0 or 1, follow the norms of its queries.

    shared: heads that every token uses (default H / 2). active: routed heads that a token uses
    (default half of them).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        shared: int | None = None,
        active: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: Style | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(
            dim,
            heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope=rope,
            bias=bias,
        )
        self.shared, self.active = head_counts(heads, shared, active)

    def heads_out(self, o: Tensor, x: Tensor, call: Call) -> Tensor:
        gates = o.new_ones(o.shape[0], o.shape[2], self.shared)
        if self.shared < self.heads:
            q = split_heads(self.q_proj(x), self.heads)
            share = router_share(query_norms(q, self.shared))
            chosen = strongest(share, self.active)
            note_balance(call, share, chosen)
            if self.training:  # the value stays 0 or 1, the gradient is that of the share
                chosen = chosen + chosen * (share - share.detach())
            gates = torch.cat([gates, chosen], -1)
        call.note("gates", gates)
        return super().heads_out(gated(o, gates), x, call)


def _replay(case: Mapping[str, Any]) -> dict[str, Any]:
    config = case["config"]
    q = split_heads(case["inputs"]["query_states"], config["num_heads"])
    norms = query_norms(q, config["shared_head"])
    share = router_share(norms)
    chosen = strongest(share, config["routed_head"])
    mask = torch.cat([torch.ones(*chosen.shape[:2], config["shared_head"]), chosen], -1)
    return {"logits": norms.flatten(0, 1), "gates": share.flatten(0, 1), "mask": mask}


MOH_LLAMA = Card(
    name="moh_llama",
    kind="layer",
    build=MoHLlama,
    papers=MOH.papers,
    family="scored",
    patterns=MOH.patterns,
    cost=Cost(time=2, state="keys"),
    claim=Claim(
        "a trained model keeps its recall when a quarter of its heads is silent",
        "regard compare --task recall --mechanisms softmax,moh_llama",
    ),
    example=Example(dim=16, options={"shared": 1, "active": 2}),
    limits=(
        Limit({"shared": 1, "active": 3}, "sigma", {"key_heads": 4, "value_heads": 4}),
        Limit({"shared": 4, "active": 0}, "sigma", {"key_heads": 4, "value_heads": 4}),
    ),
    goldens=(
        Golden(
            "1_moh_llama_router.pt",
            _replay,
            "SkyworkAI/MoH:MoH-LLaMA3/Inference_code/modeling_llama.py:LlamaAttention",
            "2cefd57",
        ),
    ),
)
