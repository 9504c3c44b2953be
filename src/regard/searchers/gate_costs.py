r"""What a model costs when only some of its parts stay, in parameters or in operations per token.

    cost = rest + a C + sum_l z_l (b C + c + C (d G_l + e U_l) + f G_l + g U_l)

C channels, layers z_l = 1 with G_l key heads and U_l units each; counts need not be whole numbers.
An operation is a multiplication and addition, counted as two, of one token in a text of `length`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.core.hosting import host_of
from regard.core.linears import BlockLinears, sides
from regard.searchers.information_gates import Factors
from regard.searchers.slimming import parameters_of

Measure = Literal["parameters", "flops"]


@dataclass(frozen=True)
class Costs:
    """The coefficients of the cost above: rest, a; b, c; d, e; f, g."""

    rest: float
    channel: float
    layer_channel: float
    layer: float
    head_channel: float
    unit_channel: float
    head: float
    unit: float

    def of(self, heads: Tensor, units: Tensor, channels: Tensor, layers: Tensor) -> Tensor:
        """Cost of heads (L,) and units (L,) in layers (L,) of channels ()."""
        inside = channels * (
            self.head_channel * heads + self.unit_channel * units + self.layer_channel
        )
        inside = inside + self.head * heads + self.unit * units + self.layer
        return (layers * inside).sum() + self.channel * channels + self.rest

    def expected(self, open_: Factors) -> Tensor:
        """Cost of gates that are so far open, the leading axis of factors being 1."""
        return self.of(
            open_.heads[0].sum(-1), open_.units[0].sum(-1), open_.channels[0].sum(), open_.layers[0]
        )


def costs_of(
    model: Any, blocks: Sequence[BlockLinears], measure: Measure, length: int = 1024
) -> Costs:
    """The costs of a model.

    Raises:
        ArgumentError: another measure, or a length below 1.
    """
    if measure not in ("parameters", "flops") or length < 1:
        raise ArgumentError("measure, length", "'parameters' or 'flops', 1 or more", measure)
    one, groups = blocks[0], blocks[0].site.kv_heads
    per_head = (sum(sides(m)[1] for m in one.heads) + sides(one.joined)[0]) / groups
    per_unit = len(one.units) + 1
    _, readout = host_of(model).readout(model)
    words = sides(readout)[1]
    if measure == "flops":
        seen = length / 2 if one.site.causal else length
        scores = 4 * seen * sides(one.joined)[0] / groups
        return Costs(0, 2 * words, 0, 0, 2 * per_head, 2 * per_unit, scores, 0)
    inner, outer = _others(model, one)
    tied = readout.weight is model.get_input_embeddings().weight
    costs = Costs(
        0,
        words * (1 if tied else 2) + 1,
        inner,
        outer,
        per_head,
        per_unit,
        sum(_bias(m) for m in one.heads) / groups,
        sum(_bias(m) for m in one.units) / one.width,
    )
    known = float(everything_of(costs, model, blocks))
    return Costs(parameters_of(model) - known, *list(vars(costs).values())[1:])


def everything_of(costs: Costs, model: Any, blocks: Sequence[BlockLinears]) -> Tensor:
    """The cost of the whole model."""
    every = torch.ones(len(blocks), dtype=torch.float64)
    channels = torch.tensor(float(model.config.hidden_size), dtype=torch.float64)
    return costs.of(every * blocks[0].site.kv_heads, every * blocks[0].width, channels, every)


def _bias(module: Any) -> int:
    bias = getattr(module, "bias", None)
    return 0 if bias is None else bias.numel()


def _others(model: Any, one: BlockLinears) -> tuple[int, int]:
    """Parameters of a layer beside its linear maps' weights: per channel, and once."""
    known = {id(p) for m in one.all for p in m.parameters()}
    inside = {id(p) for p in model.get_submodule(one.site.name).parameters()}
    channel, once = sum(1 for m in (one.joined, one.back) if _bias(m)), 0
    for parameter in one.block.parameters():
        if id(parameter) in known:
            continue
        if id(parameter) not in inside and parameter.numel() == model.config.hidden_size:
            channel += 1
        else:
            once += parameter.numel()
    return channel, once
