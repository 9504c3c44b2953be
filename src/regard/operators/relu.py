r"""ReLU attention: negative scores weigh nothing, and rows are divided by their count of keys.

    o_i = 1/n_i sum_j relu(q_i . k_j s) v_j        q: (B,H,N,D)  k: (B,H_k,M,D)  v: (B,H_v,M,E)

s is 1/sqrt(D), n_i the number of keys row i may see. A row of negative scores is zero, so that a
head with nothing to do needs no key to park on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import regard
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Golden, Paper
from regard.core.mask import Causal
from regard.core.scored import Impl, attend
from regard.core.weights import Scored


@dataclass(frozen=True)
class ReluWeights:
    """relu(s_ij) / n_i. Invisible keys weigh exactly zero."""

    kind: Literal["additive"] = "additive"

    def __call__(self, scores: Tensor, visible: Tensor | None, count: Tensor) -> Tensor:
        weights = scores.relu()
        weights = weights if visible is None else weights.masked_fill(~visible, 0.0)
        return weights / count.clamp_min(1).to(scores.dtype)


def relu(q: Tensor, k: Tensor, v: Tensor, call: Call, *, impl: Impl = "auto") -> Result:
    """Mean over the visible keys of values times rectified scores; output (B,H,N,E)."""
    return attend(q, k, v, call, Scored(normalise=ReluWeights()), impl=impl)


def convert(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """An attention layer with the weights of the authors' Attention, softmax if its config says so.

    A head's width is the layer's over their number, as in the authors' models.
    """
    name = "relu" if config["attn_use_relu"] else "softmax"
    layer = regard.create(name, dim=config["dim"], heads=config["n_heads"])
    layer.load_state_dict({f"{key[1]}_proj.weight": state[f"{key}.weight"] for key in _THEIRS})
    return layer


_THEIRS = ("wq", "wk", "wv", "wo")
_RECTIFIED = (True, False)
"""Of the two layers that every golden case holds; a case's own config says one of them."""


def _replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    call, found = Call(mask=Causal()), {}
    for index, rectified in enumerate(_RECTIFIED):
        config = {**case["config"], "attn_use_relu": rectified}
        layer, x = convert(config, case["state_dict"][f"sd{index}"]), case["inputs"][f"x{index}"]
        q, k, v = layer.heads_in(x, x, call)
        sight = torch.eye(x.shape[1], dtype=x.dtype).expand(*v.shape[:2], -1, -1)
        found[f"y{index}"] = layer(x, call)
        found[f"attn{index}"] = layer.inner(q, k, sight, call).output
    return found


CARD = Card(
    name="relu",
    kind="operator",
    build=relu,
    papers=(
        Paper("2309.08586", "Replacing softmax with ReLU in Vision Transformers", 2023),
        Paper(
            "2410.13835",
            "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena "
            "in LLMs",
            2024,
        ),
    ),
    family="scored",
    patterns=("noncausal self", "causal self", "noncausal cross", "causal cross"),
    grids=(1, 2, 3),
    cost=Cost(time=2, state="keys"),
    claim=Claim(
        "learns to copy without parking idle heads on the first token",
        "regard study bigram_backcopy",
    ),
    forms=("impl", ("dense", "tiled")),
    goldens=(
        Golden(
            "29_relu_attention.pt",
            _replay,
            "https://github.com/GuoTianYu2000/Active-Dormant-Attention",
            "16b3593",
        ),
    ),
    convert=convert,
)
