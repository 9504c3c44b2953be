"""Settling: from trained gates to a shape that a configuration can name, and weights without gates.

Each layer keeps its best key heads and units by signal over noise, as many as every other layer;
units, the finest parts, make up for what whole layers and heads miss of the target.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import UnsupportedError
from regard.core.hosting import host_of
from regard.core.linears import blocks_of, sides, weight_of
from regard.searchers.configuring import admits
from regard.searchers.gate_costs import Costs
from regard.searchers.information_gates import Factors, InformationGates
from regard.searchers.slimming import Indices, Kept


@torch.no_grad()
def settled(
    gates: InformationGates, costs: Costs, wanted: float, model: Any, into: type | None = None
) -> Kept:
    """What stays, at a cost of `wanted` as nearly as whole parts allow.

    Raises:
        UnsupportedError: the model's configuration takes no numbers near those of the open gates.
    """
    ratios = {name: gates.ratios(name).cpu() for name in gates.shapes}
    site, width = blocks_of(model)[0].site, gates.shapes["units"][1]
    free = "units" in gates.families
    layers, groups, channels = _counts(ratios, costs, wanted, width, free)
    groups, channels = _taken(model, groups, site.kv_heads, channels, into)
    units = _units_within(costs, wanted, layers, groups, channels)
    units = min(max(1, units), width) if free else width
    heads = (_best(row, groups) for row in ratios["heads"])
    return Kept(
        tuple(tuple(g * site.group + i for g in own for i in range(site.group)) for own in heads),
        tuple(_best(row, units) for row in ratios["units"]),
        _best(ratios["layers"], layers),
        _best(ratios["channels"], channels) if "channels" in gates.families else None,
    )


def _counts(
    ratios: Mapping[str, Tensor], costs: Costs, wanted: float, width: int, free: bool
) -> tuple[int, int, int]:
    """Layers, key heads and channels: as many as gates are open, or the nearest numbers with which
    units can make the cost the wanted one; if there are none, those that come nearest to it.
    """
    opened = {name: ratio < 0 for name, ratio in ratios.items()}
    channels = max(1, int(opened["channels"].sum()))
    chosen = opened["layers"] | ~opened["layers"].any()
    here = int(chosen.sum()), round(float(opened["heads"][chosen].sum(-1).double().mean()))

    def gap(counts: tuple[int, int]) -> float:
        least, most = (_cost(costs, *counts, channels, n) for n in (1 if free else width, width))
        return max(least - wanted, wanted - most, 0.0)

    def far(counts: tuple[int, int]) -> int:
        return abs(counts[0] - here[0]) + abs(counts[1] - here[1])

    depth, most = ratios["heads"].shape
    options = list(product(range(depth, 0, -1), range(most, 0, -1)))
    best = min(options, key=lambda counts: (gap(counts), far(counts)))
    if _cost(costs, *best, channels, width) < wanted:  # all of it is still too little
        one, two = (_cost(costs, *best, n, width) for n in (0, 1))
        channels = min(len(ratios["channels"]), math.ceil((wanted - one) / (two - one)))
    return *best, channels


def _cost(costs: Costs, layers: int, groups: int, channels: int, units: int) -> float:
    every = torch.ones(layers, dtype=torch.float64)
    wide = torch.tensor(float(channels), dtype=torch.float64)
    return float(costs.of(every * groups, every * units, wide, every))


def _best(ratios: Tensor, count: int) -> Indices:
    """The `count` gates with least noise, in order; of equal ones the earlier."""
    return tuple(sorted(ratios.argsort(stable=True)[:count].tolist()))


def _taken(model: Any, groups: int, most: int, channels: int, into: type | None) -> tuple[int, int]:
    """Numbers of key heads and channels that the configuration takes: the nearest heads, and no
    fewer channels if that can be.
    """
    width = model.config.hidden_size
    group = model.config.num_attention_heads // most
    fewer = () if channels == width else range(channels - 1, 0, -1)
    counts = (*range(channels, width + 1), *fewer)
    for heads in sorted(range(1, most + 1), key=lambda g: (abs(g - groups), -g)):
        for count in counts:
            changes = {"num_attention_heads": heads * group, "num_key_value_heads": heads}
            if admits(model, changes | {"hidden_size": count}, into):
                return heads, count
    raise UnsupportedError("vtrans", f"{type(model.config).__name__} takes no other numbers")


def _units_within(costs: Costs, wanted: float, layers: int, groups: int, channels: int) -> int:
    """How many units each layer may keep at a cost of at most `wanted`."""
    none, one = (_cost(costs, layers, groups, channels, n) for n in (0, 1))
    return int((wanted - none) // (one - none))


@torch.no_grad()
def folded(model: Any, means: Factors) -> Any:
    """A copy of a model whose weights do what these factors (leading axis 1) did."""
    model = copy.deepcopy(model)
    norm, readout = host_of(model).readout(model)
    embedding = model.get_input_embeddings()
    channels = means.channels[0]
    tied = readout.weight is embedding.weight
    embedding.weight.mul_(channels.to(embedding.weight))
    if tied:  # what reads the stream out was multiplied with it
        gain: Any = norm.weight
        gain.div_(torch.where(channels == 0, 1.0, channels).to(gain))
    for layer, one in enumerate(blocks_of(model)):
        width = sides(one.joined)[0] // one.site.kv_heads
        written = channels * means.layers[0, layer]
        entering = means.heads[0, layer].repeat_interleave(width), means.units[0, layer]
        for module, by in zip((one.joined, one.back), entering, strict=True):
            weight = weight_of(module)
            weight.mul_(by.to(weight)).mul_(written[:, None].to(weight))
            bias = getattr(module, "bias", None)
            if bias is not None:
                bias.mul_(written.to(weight))
    return model
