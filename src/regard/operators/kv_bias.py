r"""Softmax attention with one learned key more that every query sees: a place to park, no token.

    o_i = (1 - a_i) softmax attention + a_i v*        a_i = sigma(q_i . k* s - lse_i)

q: (B,H,N,D)  k: (B,H_k,M,D)  v: (B,H_v,M,D)  k*, v*: (H,D) or (1,D); s is 1/sqrt(D), lse_i the
log-sum-exp of row i. Without v* the extra key has value zero, and a_i is attention spent on
nothing; without k* there is no extra key, and v* is added to every output. k* knows no position. A
row that sees no key of its own gives zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import regard
from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Golden, Limit, Paper
from regard.core.errors import ArgumentError
from regard.core.mask import Causal
from regard.core.merge import merge
from regard.core.scored import Impl, attend, without_padding
from regard.core.weights import Scored, scale_of


class KVBias(nn.Module):
    """Softmax attention with learned biases on q (B,H,N,D), k (B,H_k,M,D), v (B,H_v,M,D).

    Args:
        key: learn k*. value: learn v*. per_head: one for each head, or the same for all. impl: as
            in `attend`, if it gives a log-sum-exp.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        key: bool = True,
        value: bool = False,
        per_head: bool = True,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        if not (key or value):
            raise ArgumentError("key, value", "at least one of them True", (key, value))
        rows = heads if per_head else 1
        self.key = nn.Parameter(torch.randn(rows, head_dim) * 0.02) if key else None
        self.value = nn.Parameter(torch.randn(rows, head_dim) * 0.02) if value else None
        self.impl: Impl = impl

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Output (B,H,N,D) and log-sum-exp (B,H,N), k* included."""
        check_qkv(q, k, v, call)
        if self.value is not None and v.shape[3] != self.value.shape[1]:
            raise ArgumentError("v.shape[3]", f"{self.value.shape[1]}, as v*", v.shape[3])
        q, k, v = without_padding(q, k, v, call)
        plain = attend(q, k, v, call, Scored(), impl=self.impl, need_lse=True)
        empty = torch.isneginf(plain.row_lse)
        extra = torch.zeros_like(plain.output)
        if self.value is not None:
            extra = (extra + self.value[:, None]).masked_fill(empty[..., None], 0.0)
        if self.key is None:
            return Result(plain.output + extra, plain.lse)
        scores = (q * self.key[:, None]).sum(-1) * scale_of(call, None, q.shape[3])
        scores = scores.to(plain.row_lse.dtype).masked_fill(empty, float("-inf"))
        return merge([plain, Result(extra, scores)])


def convert(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """An attention layer around this operator with the weights of the authors' layer, without its
    rotation.
    """
    groups, width = config["n_query_groups"], config["head_size"]
    layer: Any = regard.create(
        "kv_bias",
        dim=config["n_embd"],
        heads=config["n_head"],
        kv_heads=groups,
        head_dim=width,
        bias="proj.bias" in state,
        key="k_bias" in state,
        value="v_bias" in state,
        per_head=all(x.ndim == 2 for name, x in state.items() if name in ("k_bias", "v_bias")),
    )
    own = {f"o_proj.{name.partition('.')[2]}": x for name, x in state.items() if "proj" in name}
    for name, x in state.items():
        if name.startswith("attn."):
            rows = x.unflatten(0, (groups, -1, width))  # of a group: its queries, a key, a value
            parts = zip("qkv", (rows[:, :-2], rows[:, -2], rows[:, -1]), strict=True)
            own |= {f"{part}_proj.{name[5:]}": y.reshape(-1, *x.shape[1:]) for part, y in parts}
    for theirs, ours in (("k_bias", "inner.key"), ("v_bias", "inner.value")):
        if theirs in state:
            own[ours] = state[theirs].reshape(-1, width)
    layer.load_state_dict(own)
    return layer


def _replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The five layers that every golden case holds; a case's own config says one of them."""
    call, found = Call(mask=Causal()), {}
    for name, weights in case["state_dict"].items():
        index = name.removeprefix("sd")
        layer = convert(case["config"], weights)
        found[f"y{index}"] = layer(case["inputs"][f"x{index}"], call)
    return found


def _without_value(module: KVBias) -> None:
    if module.value is not None:
        nn.init.zeros_(module.value)


CARD = Card(
    name="kv_bias",
    kind="operator",
    build=KVBias,
    papers=(
        Paper(
            "2410.10781",
            "When Attention Sink Emerges in Language Models: An Empirical View",
            2024,
        ),
    ),
    family="scored",
    patterns=("noncausal self", "causal self", "noncausal cross", "causal cross"),
    grids=(1, 2, 3),
    cost=Cost(time=2, state="keys"),
    claim=Claim(
        "recalls as well as softmax, with a key of its own for what is not needed",
        "regard compare --task recall --mechanisms softmax,kv_bias",
    ),
    example=Example(options={"key": True, "value": True}),
    limits=(Limit({"key": False, "value": True}, "softmax", prepare=_without_value),),
    forms=("impl", ("dense", "tiled", "split")),
    goldens=(
        Golden(
            "32_kv_bias_attention.pt",
            _replay,
            "https://github.com/sail-sg/Attention-Sink",
            "af49727",
        ),
    ),
    convert=convert,
    deviations=("a row that sees no key gives zeros, not v*",),
)
