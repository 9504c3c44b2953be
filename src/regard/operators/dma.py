r"""Dynamic mask attention: every key rates itself from its value, a query reads the w best-rated
keys it sees, and the rating is added to their scores.

    delta_j = exp(a softplus(W vec(v_j)))        (linear form: a softplus(W vec(v_j)))
    o_i = sum over the w visible j of largest delta_j of softmax_j(q_i . k_j s + delta_j) v_j

q (B,H,N,D), k (B,H_k,M,D), v (B,H_v,M,D), s = 1/sqrt(D). delta is (B,G,M): vec(v_j) joins the G
value heads of token j, W is (G, G*D) and a (G,) starts at zero, where all keys rate the same; of
equal keys the later ones are read. Query head h takes the rating of group h // (H/G). The choice
has no gradient; W and a learn through the ratings of the keys that were read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Golden, Limit, Paper
from regard.core.errors import ArgumentError
from regard.core.mask import Causal
from regard.core.scored import without_padding
from regard.core.selected import Impl, Selected, select
from regard.core.weights import Scored, Softmax, repeat_heads
from regard.features.rotary import rotate

BiasForm = Literal["exp", "linear"]


class DynamicMask(nn.Module):
    """Dynamic mask attention on q (B,H,N,D), k (B,H_k,M,D), v (B,H_v,M,D).

    Args:
        heads: H. head_dim: D. keep: keys a query reads (w). groups: value heads G that are rated
            (default H; values of fewer heads are repeated). bias_form: "exp" as in the paper, or
            "linear". bias: on the rating map W. impl: executor of the selection.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        keep: int = 2048,
        *,
        groups: int | None = None,
        bias_form: BiasForm = "exp",
        bias: bool = False,
        impl: Impl = "masked",
    ) -> None:
        super().__init__()
        self.groups = heads if groups is None else groups
        if keep < 1:
            raise ArgumentError("keep", "at least 1", keep)
        if self.groups < 1 or heads % self.groups:
            raise ArgumentError("groups", f"a divisor of the {heads} heads", groups)
        if bias_form not in ("exp", "linear"):
            raise ArgumentError("bias_form", "'exp' or 'linear'", bias_form)
        self.keep, self.bias_form = keep, bias_form
        self.impl: Impl = impl
        self.dt_proj = nn.Linear(self.groups * head_dim, self.groups, bias=bias)
        self.A = nn.Parameter(torch.zeros(self.groups))

    def rating(self, v: Tensor) -> Tensor:
        """delta (B,G,M) of values v (B,H_v,M,D), H_v a divisor of G."""
        if self.groups % v.shape[1]:
            raise ArgumentError("v.shape[1]", f"a divisor of the {self.groups} groups", v.shape[1])
        joined = repeat_heads(v, self.groups).transpose(1, 2).flatten(2)  # (B,M,G*D)
        steps = self.A * F.softplus(self.dt_proj(joined))
        if self.bias_form == "exp":
            steps = steps.clamp_max(math.log(torch.finfo(steps.dtype).max) / 2).exp()
        return steps.mT

    def selection(self, v: Tensor, heads: int) -> Selected:
        """The selecting mechanism for values v (B,H_v,M,D) and H = `heads` query heads."""
        delta = repeat_heads(self.rating(v), heads)
        return Selected(delta[:, :, None], self.keep, inner=Scored(key_bias=delta))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Output (B,H,N,D)."""
        check_qkv(q, k, v, call)
        q, k, v = without_padding(q, k, v, call)
        return select(q, k, v, call, self.selection(v, q.shape[1]), impl=self.impl)


def _authors_module(config: Mapping[str, Any], state: Mapping[str, Any]) -> DynamicMask:
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = state["q_norm.weight"].shape[0]
    module = DynamicMask(
        heads,
        head_dim,
        config["keep_window_size"],
        groups=groups,
        bias="dt_proj.bias" in state,
    ).to(state["A"])
    own = {name: state[name] for name in module.state_dict()}
    module.load_state_dict(own)
    return module.eval()


def _authors_heads(case: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the authors' layer: projections, RMS norm of each head in float32, rotary
    positions.
    """
    x, state, eps = case["inputs"]["x"], case["state_dict"], case["config"]["eps"]
    width = state["q_norm.weight"].shape[0]
    heads = {
        name: F.linear(x, state[f"{name}_proj.weight"], state.get(f"{name}_proj.bias"))
        .unflatten(-1, (-1, width))
        .transpose(1, 2)
        for name in "qkv"
    }
    cos, sin = case["inputs"]["cos"], case["inputs"]["sin"]
    angles = torch.atan2(sin, cos)[:, None, :, : width // 2]
    for name in "qk":
        plain = F.rms_norm(heads[name].float(), (width,), eps=eps).to(x.dtype)
        heads[name] = rotate(state[f"{name}_norm.weight"] * plain, angles)
    return heads["q"], heads["k"], heads["v"]


@dataclass(frozen=True)
class _SingleSoftmax:
    """Softmax in float32 whatever the scores, as in the authors' layer."""

    kind: Literal["online"] = "online"

    def __call__(self, scores: Tensor, visible: Tensor, count: Tensor) -> Tensor:
        return Softmax()(scores.float(), visible, count).to(scores.dtype)


def _replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    state, module = case["state_dict"], _authors_module(case["config"], case["state_dict"])
    q, k, v = _authors_heads(case)
    own = module.selection(v, q.shape[1])
    method = replace(own, inner=replace(own.inner, normalise=_SingleSoftmax()))
    call, basis = Call(mask=Causal()), torch.eye(k.shape[2]).to(v).expand(*v.shape[:2], -1, -1)
    joined = select(q, k, v, call, method).output.transpose(1, 2).flatten(2)
    even = select(q, torch.zeros_like(k), basis, call, replace(own, inner=Scored())).output
    return {
        "y": F.linear(joined, state["o_proj.weight"], state.get("o_proj.bias")),
        "attn": select(q, k, basis, call, method).output,
        "delta": module.rating(v),
        "kept": even[:, :: q.shape[1] // v.shape[1]] > 0,
    }


def _equal_ratings(module: DynamicMask) -> None:
    with torch.no_grad():
        module.A.zero_()


DMA = Card(
    name="dma",
    kind="operator",
    build=DynamicMask,
    papers=(Paper("2508.02124", "Trainable Dynamic Mask Sparse Attention", 2025),),
    family="selected",
    patterns=("noncausal self", "causal self", "noncausal cross", "causal cross"),
    cost=Cost(time=2, state="keys"),
    claim=Claim(
        "recalls part of what softmax does while it reads a quarter of the keys",
        'regard compare --mechanisms "softmax,dma(keep=16)"',
    ),
    example=Example(options={"keep": 4}),
    limits=(Limit({"keep": 10**6}, "softmax", prepare=_equal_ratings),),
    forms=("impl", ("masked", "gathered")),
    goldens=(
        Golden(
            "66_dma_doge.pt",
            _replay,
            "huggingface/transformers:models/doge/modeling_doge.py:DogeAttention",
            "5.2.0",
        ),
    ),
    convert=_authors_module,
    deviations=(
        "of keys that rate the same the later ones are read; the authors leave that open",
        "exp saturates at the square root of the largest number of the dtype",
        "the smoothing of whole blocks and the rule bias > 0 of a later kernel are left out",
    ),
)
