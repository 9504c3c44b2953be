r"""Hedgehog: linear attention whose feature maps are learned, to imitate softmax weights.

    a_ij = phi_q(q_i) . phi_k(k_j) / sum_m phi_q(q_i) . phi_k(k_m)        o_i = sum_j a_ij v_j

q: (B,H,N,D)  k: (B,H_k,M,D)  v: (B,H_v,M,E). The maps (`regard.features.hedgehog`) have one matrix
per query head, separate for queries and keys, and start from the identity; rotary positions come
before them. `regard.features.mimicry` has the loss that trains them against the softmax weights of
the same q and k.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Golden, Limit, Paper
from regard.core.mask import Causal
from regard.core.recurrent import Form, Memory, Recurrent, recur
from regard.core.scored import without_padding
from regard.core.weights import repeat_heads
from regard.features.hedgehog import Activation, HedgehogMap
from regard.features.mimicry import linear_weights, mimicry_loss, softmax_weights


class Hedgehog(nn.Module):
    """Linear attention with learned maps for `heads` heads of width `head_dim`."""

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        feature_dim: int | None = None,
        activation: Activation = "softmax",
        bias: bool = False,
        chunk: int = 64,
        form: Form = "auto",
    ) -> None:
        super().__init__()
        self.query_map, self.key_map = (
            HedgehogMap(heads, head_dim, feature_dim=feature_dim, activation=activation, bias=bias)
            for _ in range(2)
        )
        self.chunk = chunk
        self.form: Form = form

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """phi_q(q) and phi_k(k), both with all query heads."""
        return self.query_map(q), self.key_map(repeat_heads(k, q.shape[1]))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, state: Memory | None = None
    ) -> Result:
        """Normalised linear attention on learned features."""
        check_qkv(q, k, v, call)
        q, k, v = without_padding(q, k, v, call)
        method = Recurrent(normalise=True, chunk=self.chunk)
        return recur(*self.features(q, k), v, call, method, state=state, form=self.form)


_ACTIVATIONS: Mapping[str, Activation] = {
    "softmax_dim": "softmax",
    "exp_dim": "exp",
    "pos_elu": "elu",
    "relu": "relu",
}


def convert(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Hedgehog:
    """Our module with the authors' maps: (H,D,f) per side, or one linear map for all heads of both
    sides.
    """
    if "layer.weight" in weights:
        heads, width = config.get("num_heads", 1), weights["layer.weight"].shape[1]
        ours = Hedgehog(heads, width, activation="joint", bias=True)
        matrix = weights["layer.weight"].T.expand(heads, -1, -1)
        bias = weights["layer.bias"].expand(heads, -1)
        mine = {"query_map.weight": matrix, "key_map.weight": matrix}
        ours.load_state_dict({**mine, "query_map.bias": bias, "key_map.bias": bias})
        return ours
    heads, width, features = weights["q.mlp.layer"].shape
    activation = _ACTIVATIONS[config["activation"]]
    ours = Hedgehog(heads, width, feature_dim=features, activation=activation)
    sides = {"query_map.weight": "q.mlp.layer", "key_map.weight": "k.mlp.layer"}
    ours.load_state_dict({name: weights[theirs] for name, theirs in sides.items()})
    return ours


def replay(case: Mapping[str, Any]) -> dict[str, Any]:
    """Features, weights, outputs and the mimicry loss, as far as the case has them."""
    inputs, weights = case["inputs"], case["state_dict"]
    if "q" not in inputs:  # a feature map alone, the same for every head
        ((x,), (name,)) = inputs.values(), case["outputs"]
        phi = convert({"num_heads": 1}, weights).query_map(x.reshape(1, 1, -1, x.shape[-1]))
        return {name: phi.reshape(*x.shape[:-1], -1)}
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    ours = convert({**case["config"], "num_heads": q.shape[1]}, weights)
    phi_q, phi_k = ours.features(q, k)
    causal = Call(mask=Causal())
    found = {
        "phi_q": phi_q,
        "phi_k": phi_k,
        "y_causal": ours(q, k, v, causal).output,
        "attn_causal": linear_weights(phi_q, phi_k, causal),
        "y_noncausal": ours(q, k, v, Call()).output,
        "softmax_attn": softmax_weights(q, k, causal),
        "distill_xent": mimicry_loss(q, k, phi_q, phi_k, causal),
    }
    return {name: value for name, value in found.items() if name in case["outputs"]}


def _identity(module: Hedgehog) -> None:
    with torch.no_grad():
        for side in (module.query_map, module.key_map):
            side.weight.copy_(torch.eye(*side.weight.shape[1:]))


HEDGEHOG = Card(
    name="hedgehog",
    kind="operator",
    build=Hedgehog,
    papers=(
        Paper(
            "2402.04347",
            "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
            2024,
        ),
    ),
    family="recurrent",
    patterns=("noncausal self", "causal self", "noncausal cross"),
    grids=(1, 2, 3),
    cost=Cost(time=1, state="constant"),
    claim=Claim(
        "recalls better than elu+1 features at the same cost",
        "regard compare --task recall --mechanisms linear,hedgehog,softmax",
    ),
    forms=("form", ("parallel", "chunk", "scan")),
    limits=(Limit({"activation": "elu"}, "linear", prepare=_identity),),
    goldens=(
        Golden(
            file="141_hedgehog.pt",
            replay=replay,
            source="HazyResearch/lolcats:src/model/feature_map.py, linear_attention.py",
            commit="375df84",
            leaves={"y_hybrid_window": "the hybrid is the card lolcats"},
        ),
    ),
    convert=convert,
)
