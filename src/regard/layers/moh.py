r"""Mixture-of-Head attention: every token weighs its heads, and leaves some of them out.

    y_i = W_o concat_h(g_ih o_ih)        o: (B,H,N,D) softmax attention  g: (B,N,H) from x
    routed heads   r = softmax(W_r x), c = 1 for the K largest of E, else 0
                   g = a_2 K r c / sum_e(r_e c_e)
    shared heads   g = a_1 S softmax(W_s x)        (a_1, a_2) = 2 softmax(W_h x)

Heads 0..S-1 are shared, the other E = H - S routed. Routers of zeros give gates of 1 where K = E:
softmax attention. Without shared or without routed heads there is no a; one shared head has no W_s.
`call.notes` receives "gates" and "balance_loss", E^2 mean_e(mean_i r_ie mean_i c_ie), which is
K when the heads are used evenly.

Differs from the paper: gates carry the factors 2, S and K of the released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.call import Call
from regard.core.card import Card, Claim, Cost, Example, Golden, Limit, Paper
from regard.core.errors import ArgumentError
from regard.core.selected import choose
from regard.features.rotary import Style
from regard.layers.attention import Attention, Norm


class HeadGates(nn.Module):
    """Factors (B,N,H) on the heads of each token x (B,N,C).

    shared: heads that every token uses (default H / 2). active: routed heads that a token uses
    (default half of them).
    """

    def __init__(
        self, dim: int, heads: int, shared: int | None = None, active: int | None = None
    ) -> None:
        super().__init__()
        self.shared, self.active = head_counts(heads, shared, active)
        routed = heads - self.shared
        self.route = nn.Linear(dim, routed, bias=False) if routed else None
        self.weigh = nn.Linear(dim, self.shared, bias=False) if self.shared > 1 else None
        self.mix = nn.Linear(dim, 2, bias=False) if routed and self.shared else None

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """(B,N,C) -> (B,N,H)."""
        own = x.new_ones(*x.shape[:2], self.shared)
        if self.weigh is not None:
            own = self.shared * self.weigh(x).softmax(-1)
        gates = own
        if self.route is not None:
            share = self.route(x).softmax(-1)
            chosen = strongest(share, self.active)
            kept = share * chosen
            total = kept.sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).eps)
            routed = self.active * kept / total
            if self.mix is not None:
                balance = 2 * self.mix(x).softmax(-1)
                own, routed = balance[..., :1] * own, balance[..., 1:] * routed
            gates = torch.cat([own, routed], -1)
            note_balance(call, share, chosen)
        call.note("gates", gates)
        return gates


def head_counts(heads: int, shared: int | None, active: int | None) -> tuple[int, int]:
    """Shared and active routed heads, with their defaults; ArgumentError where they do not fit."""
    shared = heads // 2 if shared is None else shared
    if not 0 <= shared <= heads:
        raise ArgumentError("shared", f"0 to the {heads} heads", shared)
    routed = heads - shared
    active = (routed + 1) // 2 if active is None else active
    if not min(routed, 1) <= active <= routed:
        raise ArgumentError("active", f"{min(routed, 1)} to the {routed} routed heads", active)
    return shared, active


def strongest(share: Tensor, count: int) -> Tensor:
    """1 at the `count` largest entries of each row of (B,N,E), 0 elsewhere."""
    index = choose(share, torch.ones_like(share, dtype=torch.bool), count).index
    return torch.zeros_like(share).scatter(-1, index, 1.0)


def note_balance(call: Call, share: Tensor, chosen: Tensor) -> None:
    """Leave the load-balance loss of router shares and choices (B,N,E), over real tokens."""
    if call.notes is None:
        return
    real = torch.ones_like(share[..., 0]) if call.query_padding is None else call.query_padding
    weight = real.to(share.dtype)[..., None] / real.sum().clamp_min(1)
    used, wanted = (chosen * weight).sum((0, 1)), (share * weight).sum((0, 1))
    call.note("balance_loss", share.shape[-1] ** 2 * (used * wanted).mean())


def gated(o: Tensor, gates: Tensor) -> Tensor:
    """Head outputs o (B,H,N,D) times the gates (B,N,H) of their tokens."""
    return o * gates.transpose(1, 2)[..., None]


class MoH(Attention):
    """Softmax attention with `HeadGates` (shared, active) on the outputs of its heads. The output
    projection always has a bias, the others where asked.
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
        qk_norm: Norm | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(
            dim,
            heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope=rope,
            qk_norm=qk_norm,
            bias=bias,
            out_bias=True,
        )
        self.gates = HeadGates(dim, heads, shared, active)

    def heads_out(self, o: Tensor, x: Tensor, call: Call) -> Tensor:
        return super().heads_out(gated(o, self.gates(x, call)), x, call)


GATES = {"wg.": "gates.route.", "wg_0.": "gates.mix.", "wg_1.": "gates.weigh."}
"""The authors' names of the routers, and ours."""


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """A state dict with prefixes renamed, and `qkv.` split into three projections."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("qkv."):
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                found[f"{letter}_proj.{name.removeprefix('qkv.')}"] = part
            continue
        prefix = next((p for p in names if name.startswith(p)), "")
        found[names.get(prefix, "") + name.removeprefix(prefix)] = value
    return found


def _convert(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> MoH:
    module = MoH(
        config["dim"],
        config["num_heads"],
        shared=config["shared_head"],
        active=config["routed_head"],
        head_dim=config.get("head_dim"),
        qk_norm="layer" if config.get("qk_norm") else None,
        bias=config.get("qkv_bias", False),
    )
    module.load_state_dict(renamed(state, {**GATES, "proj.": "o_proj."}))
    return module.eval()


def _replay(case: Mapping[str, Any]) -> dict[str, Any]:
    module, x, notes = _convert(case["config"], case["state_dict"]), case["inputs"]["x"], {}
    found = {"y": module(x, Call(notes=notes)), "y_float64": module.double()(x.double())}
    return found | ({"l_aux": notes["balance_loss"][0]} if "balance_loss" in notes else {})


def _silence(module: MoH) -> None:
    """Routers of zeros: every head counts once."""
    for parameter in module.gates.parameters():
        nn.init.zeros_(parameter)


def _without_routers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("gates.")}


MOH = Card(
    name="moh",
    kind="layer",
    build=MoH,
    papers=(Paper("2410.11842", "MoH: Multi-Head Attention as Mixture-of-Head Attention", 2024),),
    family="scored",
    patterns=("noncausal self", "causal self", "noncausal cross", "causal cross"),
    grids=(1, 2, 3),
    cost=Cost(time=2, state="keys"),
    claim=Claim(
        "three quarters of the heads recall as well as all of them",
        "regard compare --task recall --mechanisms softmax,moh",
    ),
    example=Example(dim=16, options={"shared": 2, "active": 1, "bias": True}),
    limits=tuple(
        Limit(
            {"shared": shared, "active": 4 - shared},
            "moh_llama",
            {"shared": 4, "active": 0, "bias": True},
            weights=_without_routers,
            prepare=_silence,
        )
        for shared in (0, 1, 2, 4)
    ),
    goldens=(
        Golden("1_moh_dit.pt", _replay, "SkyworkAI/MoH:MoH-DiT/models.py:MoHAttention", "2cefd57"),
    ),
    convert=_convert,
)
