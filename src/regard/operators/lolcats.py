r"""LoLCATs: softmax inside a sliding window, linear attention on everything older, one denominator.

    a_ij ~ gamma e^{q_i . k_j / sqrt(D) - m_i}        i - w < j <= i,  m_i the largest such score
    a_ij ~ (1 - gamma) phi_q(q_i) . phi_k(k_j)        j <= i - w
    o_i = sum_j a_ij v_j / sum_j a_ij

q: (B,H,N,D)  k: (B,H_k,N,D)  v: (B,H_v,N,E); gamma = sigmoid of one parameter per head, phi as in
`regard.features.hedgehog`. The linear part is a recurrence whose keys arrive w tokens late, so the
decode state is a window of w keys and a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Golden, Limit, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mask import Causal
from regard.core.padding import Alignment
from regard.core.recurrent import Form, Memory, Recurrent, inverse, is_causal, recur, widened
from regard.core.scored import without_padding
from regard.core.weights import repeat_heads, scale_of
from regard.features.hedgehog import Activation, HedgehogMap
from regard.operators.hedgehog import convert as convert_maps


@dataclass(frozen=True, eq=False)
class WindowMemory:
    """Decode state: the last w keys k (B,H,w,D) and values v (B,H,w,E), the latest last, which of
    them are real (B,w), and the memory of everything older.
    """

    k: Tensor
    v: Tensor
    real: Tensor
    older: Memory | None


class Lolcats(nn.Module):
    """Hybrid of a softmax window and linear attention, causal.

    Args:
        heads: H. head_dim: D. window: w >= 1, the query's own key included. affine: the linear part
            weighs 1 - gamma; otherwise 1. feature_dim, activation: of the feature maps.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        window: int = 64,
        affine: bool = True,
        feature_dim: int | None = None,
        activation: Activation = "softmax",
        form: Form = "auto",
    ) -> None:
        super().__init__()
        if window < 1:
            raise ArgumentError("window", "at least 1", window)
        self.query_map, self.key_map = (
            HedgehogMap(heads, head_dim, feature_dim=feature_dim, activation=activation)
            for _ in range(2)
        )
        self.window_factor = nn.Parameter(torch.zeros(heads))
        self.window, self.affine = window, affine
        self.form: Form = form

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, state: WindowMemory | None = None
    ) -> Result:
        """Causal hybrid attention; Result.state is the WindowMemory after the last token."""
        check_qkv(q, k, v, call)
        if not is_causal(call, "lolcats") or q.shape[2] != k.shape[2]:
            raise UnsupportedError("lolcats", "it serves causal self-attention only (Causal())")
        n, w = q.shape[2], self.window
        q, k, v = without_padding(q, k, v, call)
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
        q, k, v, real, order = _joined(q, k, v, call, state, w)
        values = F.pad(v, (0, 1), value=1.0)  # the last column sums the weights
        far = self._far(q, k[:, :, :n], values[:, :, :n], real[:, :n], state)
        near_form = _in_window if self.form == "parallel" else _in_window_blocks
        near = near_form(q * scale_of(call, None, q.shape[-1]), k, values, real[:, None], w)
        o = self._shared(near, far.output).to(q.dtype)
        if order is not None:
            o = order.back(F.pad(o, (0, 0, w, 0)))[:, :, w:]
        if call.query_padding is not None:
            o = o.masked_fill(~call.query_padding[:, None, :, None], 0.0)
        return Result(o, state=WindowMemory(k[:, :, n:], v[:, :, n:], real[:, n:], far.state))

    def _far(
        self, q: Tensor, k: Tensor, values: Tensor, real: Tensor, state: WindowMemory | None
    ) -> Result:
        """Linear part: query n meets the key that came w tokens before it, and all older ones."""
        late = Call(mask=Causal(), padding=real)
        older = None if state is None else state.older
        phi_q, phi_k = self.query_map(q), self.key_map(k)
        return recur(phi_q, phi_k, values, late, Recurrent(), state=older, form=self.form)

    def _shared(self, near: Tensor, far: Tensor) -> Tensor:
        """Outputs (B,H,N,E) under the common denominator, the last column of both parts."""
        gamma = self.window_factor.sigmoid()[:, None, None]
        mixed = gamma * near + (1 - gamma if self.affine else 1.0) * far
        return mixed[..., :-1] * inverse(mixed[..., -1:])


def _joined(
    q: Tensor, k: Tensor, v: Tensor, call: Call, state: WindowMemory | None, w: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Alignment | None]:
    """Keys and values behind the w of the state, real ones last, (B,H,w+N,·); which are real
    (B,w+N), queries (B,H,N,D) in the same order, and that order unless nothing moved.
    """
    real = call.padding
    if real is None:
        real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
    if state is None:
        k, v, real = F.pad(k, (0, 0, w, 0)), F.pad(v, (0, 0, w, 0)), F.pad(real, (w, 0))
    else:
        k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        real = torch.cat([state.real, real], 1)
    if call.padding is None:
        return q, k, v, real, None
    last = real.long().argsort(dim=-1, stable=True)
    order = Alignment(last, real.gather(-1, last))
    q = order.front(F.pad(q, (0, 0, w, 0)))[:, :, w:]
    return q, order.front(k), order.front(v), order.padding, order


def _in_window(q: Tensor, k: Tensor, values: Tensor, real: Tensor, w: int) -> Tensor:
    """Sums over the window of scaled queries (…,n,D): keys (…,w+n,D) start w tokens before them;
    real (…,w+n).
    """
    row = torch.arange(q.shape[-2], device=q.device)[:, None]
    key = torch.arange(k.shape[-2], device=q.device)
    visible = (key > row) & (key <= row + w) & real[..., None, :]
    scores = (widened(q) @ widened(k).mT).masked_fill(~visible, float("-inf"))
    peak = scores.amax(-1, keepdim=True)
    return (scores - peak.masked_fill(peak == float("-inf"), 0.0)).exp() @ widened(values)


def _in_window_blocks(q: Tensor, k: Tensor, values: Tensor, real: Tensor, w: int) -> Tensor:
    """The same in blocks of w queries, each with the keys of its own and the previous block."""
    n = q.shape[2]
    blocks = -(-n // w)
    q = F.pad(q, (0, 0, 0, blocks * w - n)).unflatten(2, (blocks, w))

    def pairs(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, (blocks + 1) * w - x.shape[2])).unflatten(2, (blocks + 1, w))
        return torch.cat([x[:, :, :-1], x[:, :, 1:]], 3)

    sums = _in_window(q, pairs(k), pairs(values), pairs(real[..., None])[..., 0], w)
    return sums.flatten(2, 3)[:, :, :n]


def replay(case: Mapping[str, Any]) -> dict[str, Any]:
    """The hybrid output; the case gives sigmoid(window factor) and what the linear part weighs."""
    inputs, maps = case["inputs"], convert_maps(case["config"], case["state_dict"])
    share = inputs["window_factor"].flatten()
    ours = Lolcats(
        share.numel(),
        inputs["q"].shape[-1],
        window=case["config"]["window_size"],
        affine=bool((inputs["linear_factor"] != 1).any()),
        feature_dim=maps.query_map.weight.shape[-1],
        activation=maps.query_map.activation,
    )
    ours.load_state_dict({**maps.state_dict(), "window_factor": share.logit()})
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    return {"y_hybrid_window": ours(q, k, v, Call(mask=Causal())).output}


LOLCATS = Card(
    name="lolcats",
    kind="operator",
    build=Lolcats,
    papers=(
        Paper("2410.10254", "LoLCATs: On Low-Rank Linearizing of Large Language Models", 2024),
    ),
    family="recurrent",
    patterns=("causal self",),
    cost=Cost(time=1, state="constant"),
    claim=Claim(
        "recalls more than hedgehog with a constant state",
        "regard compare --task recall --mechanisms hedgehog,lolcats,softmax",
    ),
    example=Example(options={"window": 3}),
    forms=("form", ("parallel", "chunk", "scan")),
    limits=(Limit({"window": 64}, "softmax"),),
    goldens=(
        Golden(
            file="141_hedgehog.pt",
            replay=replay,
            source="HazyResearch/lolcats:src/model/linear_attention/linear_window_attention_sw.py",
            commit="375df84",
            leaves=dict.fromkeys(
                (
                    "phi_q",
                    "phi_k",
                    "y_causal",
                    "attn_causal",
                    "y_noncausal",
                    "softmax_attn",
                    "distill_xent",
                ),
                "without a window: the card hedgehog",
            ),
            only=lambda case: "y_hybrid_window" in case["outputs"],
        ),
    ),
)
