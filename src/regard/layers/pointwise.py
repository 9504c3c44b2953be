r"""A token-wise gated MLP in attention's place: no mixing of tokens at all.

    y = W_dn (SiLU(W_gate x) ⊙ W_up x)        x: (B,N,C)

Its width is 4C/3, so that it has as many parameters as W_q, W_k, W_v and W_o of multi-head
attention. It is the floor for any claim that a layer must mix tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from regard.core.boundary import check_tokens, refuse
from regard.core.call import Call
from regard.core.card import Card, Claim, Cost, Limit, Paper
from regard.core.mask import Causal
from regard.core.recurrent import is_causal
from regard.core.state import Decoding, arrivals
from regard.layers.attention import real_tokens
from regard.layers.feedforward import FeedForward


class MLP(nn.Module):
    """(B,N,C) -> (B,N,C), each token on its own.

    Args:
        dim: width C. heads: there are none; taken so that the layer can stand in for attention.
            hidden: width of the MLP (default 4C/3). bias: on all three maps.
    """

    def __init__(
        self, dim: int, heads: int, *, hidden: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        self.dim = dim
        self.inner = FeedForward(dim, hidden or round(4 * dim / 3), gated=True, bias=bias)

    def forward(self, x: Tensor, call: Call = Call()) -> Tensor:
        """(B,N,C) -> (B,N,C). The call's mask may be None or Causal(): a token sees itself."""
        check_tokens(x, self.dim, call)
        refuse(call, "mlp", "scale")
        is_causal(call, "mlp")
        return self.inner(real_tokens(x, call.of_self().query_padding))

    def step(
        self, x: Tensor, state: Decoding | None, call: Call = Call(mask=Causal())
    ) -> tuple[Tensor, Decoding]:
        """New tokens x (B,T,C) -> (B,T,C); nothing is carried but their number."""
        y = self(x, call)
        _, _, seen = arrivals(x, call, None if state is None else state.seen)
        return y, Decoding(seen)


_OPEN = 64.0  # SiLU(64) is 64 to the last bit


def _constant_gate(layer: MLP) -> None:
    nn.init.zeros_(layer.inner.fc1.weight)
    nn.init.constant_(layer.inner.fc1.bias, _OPEN)


def _as_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """W_v and W_o of an attention whose tokens see only themselves, for a constant gate."""
    own = {}
    for kind in ("weight", "bias"):
        own[f"v_proj.{kind}"] = _OPEN * state[f"inner.gate.{kind}"]
        own[f"o_proj.{kind}"] = state[f"inner.fc2.{kind}"]
        for part in "qk":
            own[f"{part}_proj.{kind}"] = torch.zeros_like(own[f"v_proj.{kind}"])
    return own


MLP_CARD = Card(
    name="mlp",
    kind="layer",
    build=MLP,
    papers=(
        Paper(
            "2510.11602",
            "Deconstructing Attention: Investigating Design Principles for Effective "
            "Language Modeling",
            2025,
        ),
    ),
    family="free",
    patterns=("noncausal self", "causal self"),
    cost=Cost(time=1, state="constant"),
    claim=Claim(
        "stays at chance wherever the answer stands in another token",
        "regard compare --task recall --mechanisms softmax,mlp",
    ),
    limits=(
        Limit(
            {"hidden": 32, "bias": True},
            "static_emb_qk",
            {"operator": "sliding_window", "options": {"window": 1, "sinks": 0}, "bias": True},
            prepare=_constant_gate,
            weights=_as_attention,
        ),
    ),
    gaps={"past_visible": "it mixes no tokens, which is its point"},
)
