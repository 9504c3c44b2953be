r"""Mixture-of-Head attention for vision: MoH gates on TransNeXt's two forms of attention.

    y_i = W_o concat_h(g_ih o_ih)        g: (B,N,H) as in `moh`, from the input x (B, h*w, C)

o is length-scaled cosine attention over the grid (`moh_vit`), or over a window and the pooled grid
(`moh_vit_aggregated`, whose cost is linear in the cells where `pool` fixes the pooled grid).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from regard.core.call import Call
from regard.core.card import Card, Claim, Cost, Example, Golden
from regard.features.grid import Sides
from regard.layers.aggregated import AggregatedAttention
from regard.layers.length_scaled import CosineHeads, LengthScaledAttention
from regard.layers.moh import GATES, MOH, HeadGates, gated, renamed


class MoHViT(LengthScaledAttention):
    """Length-scaled cosine attention with `HeadGates`."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        shared: int | None = None,
        active: int | None = None,
        bias: bool = True,
        pretrain_grid: Sides | None = None,
    ) -> None:
        super().__init__(dim, heads, bias=bias, pretrain_grid=pretrain_grid)
        self.gates = HeadGates(dim, heads, shared, active)

    def heads_out(self, o: Tensor, x: Tensor, call: Call) -> Tensor:
        return super().heads_out(gated(o, self.gates(x, call)), x, call)


class MoHViTAggregated(AggregatedAttention):
    """Aggregated attention with `HeadGates`."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 3,
        reduction: int = 8,
        pool: int | None = None,
        shared: int | None = None,
        active: int | None = None,
        bias: bool = True,
        pretrain_grid: Sides | None = None,
    ) -> None:
        super().__init__(
            dim,
            heads,
            window=window,
            reduction=reduction,
            pool=pool,
            bias=bias,
            pretrain_grid=pretrain_grid,
        )
        self.gates = HeadGates(dim, heads, shared, active)

    def heads_out(self, o: Tensor, x: Tensor, call: Call) -> Tensor:
        return super().heads_out(gated(o, self.gates(x, call)), x, call)


NAMES = {
    "q.": "q_proj.",
    "proj.": "o_proj.",
    "cpb_fc1.": "offsets.fc1.",
    "cpb_fc2.": "offsets.fc2.",
    "sr.": "reduce.",
    "relative_pos_bias_local": "local_bias",
    "learnable_tokens": "local_tokens",
    "learnable_bias": "local_offset",
    **GATES,
}
"""The authors' names, and ours; the others agree."""


def _loaded(module: CosineHeads, state: Mapping[str, Tensor]) -> Any:
    found = renamed(state, NAMES)
    if "reduce.weight" in found:  # a 1 x 1 convolution
        found["reduce.weight"] = found["reduce.weight"].flatten(1)
    for name in [name for name in found if name.startswith("kv.")]:
        k, v = found.pop(name).chunk(2)
        found[name.replace("kv.", "k_proj.")], found[name.replace("kv.", "v_proj.")] = k, v
    module.load_state_dict(found)
    return module.eval()


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "shared": config["shared_head"],
        "active": config["routed_head"],
        "bias": config.get("qkv_bias", True),
    }


def _convert(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> MoHViT:
    return _loaded(MoHViT(config["dim"], config["num_heads"], **_options(config)), state)


def _convert_aggregated(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> MoHViTAggregated:
    module = MoHViTAggregated(
        config["dim"],
        config["num_heads"],
        window=config.get("window_size", 3),
        reduction=config.get("sr_ratio", 1),
        pool=config.get("fixed_pool_size"),
        **_options(config),
    )
    return _loaded(module, state)


def _replay(case: Mapping[str, Any]) -> dict[str, Any]:
    convert = _convert_aggregated if "window_size" in case["config"] else _convert
    module = convert(case["config"], case["state_dict"])
    inputs = case["inputs"]
    return {"y": module(inputs["x"], Call(grid=(inputs["H"], inputs["W"])))}


MOH_VIT = Card(
    name="moh_vit",
    kind="layer",
    build=MoHViT,
    papers=MOH.papers,
    family="scored",
    patterns=("noncausal self",),
    grids=(2,),
    cost=Cost(time=2, state="none"),
    claim=Claim(
        "classifies digits with some heads silent at every token",
        "regard compare --task digits --mechanisms softmax,moh_vit",
    ),
    example=Example(grid=(3, 4), options={"shared": 2, "active": 1}),
    goldens=(
        Golden("1_moh_vit.pt", _replay, "SkyworkAI/MoH:MoH-ViT/attention.py:Attention", "2cefd57"),
    ),
    convert=_convert,
)

MOH_VIT_AGGREGATED = Card(
    name="moh_vit_aggregated",
    kind="layer",
    build=MoHViTAggregated,
    papers=MOH.papers,
    family="pooled",
    patterns=("noncausal self",),
    grids=(2,),
    cost=Cost(time=1, state="none"),
    claim=Claim(
        "classifies digits from a window and a pooled grid",
        "regard compare --task digits --mechanisms 'softmax,moh_vit_aggregated(reduction=2)'",
    ),
    example=Example(grid=(4, 6), options={"pool": 2, "shared": 2, "active": 1}),
    goldens=(
        Golden(
            "1_moh_vit_aggregated.pt",
            _replay,
            "SkyworkAI/MoH:MoH-ViT/attention_native.py:AggregatedAttention",
            "2cefd57",
        ),
    ),
    convert=_convert_aggregated,
)
