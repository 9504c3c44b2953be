"""From gates to a plan: the key heads of the lowest gates stream, the others keep everything.

Gates that the authors have published are tables of text, a row per layer and a column per key head,
which `torch.from_numpy(numpy.loadtxt(PATH))` reads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.plan import Plan, Step
from regard.treatments.duo import check_stream


def streaming_heads(gates: Tensor, sparsity: float) -> Tensor:
    """The key heads, boolean (layers, key heads), that a sparsity in [0, 1] makes streaming: those
    below that quantile of the gates, which are ceil(sparsity (heads - 1)), or all at 1. Of equal
    gates the earlier layer and head goes first.
    """
    if not 0 <= sparsity <= 1:
        raise ArgumentError("sparsity", "a fraction in [0, 1]", sparsity)
    if gates.ndim != 2 or not bool(gates.isfinite().all()):
        raise ArgumentError("gates", "finite numbers (layers, key heads)", tuple(gates.shape))
    total = gates.numel()
    count = total if sparsity == 1 else math.ceil(round(sparsity * (total - 1), 9))
    order = gates.flatten().clamp(0, 1).argsort(stable=True)
    chosen = torch.zeros(total, dtype=torch.bool, device=gates.device)
    chosen[order[:count]] = True
    return chosen.view_as(gates)


def plan_from_gates(gates: Tensor, sparsity: float, sinks: int = 64, recent: int = 256) -> Plan:
    """A plan in which the key heads of the lowest gates keep sinks and recent tokens only; layers
    with the same streaming heads share a step.

    Raises:
        ArgumentError: gates that are no finite matrix, a sparsity outside [0, 1].
    """
    check_stream(sinks, recent)
    layers: dict[tuple[int, ...], list[int]] = {}
    for layer, row in enumerate(streaming_heads(gates, sparsity)):
        heads = tuple(row.nonzero().flatten().tolist())
        if heads:
            layers.setdefault(heads, []).append(layer)
    options = {"sinks": sinks, "recent": recent, "window": True}
    steps = tuple(
        Step(treatment="stream", options=options, layers=tuple(where), kv_heads=heads)
        for heads, where in layers.items()
    )
    return Plan(name=f"streaming heads at sparsity {sparsity:g}", steps=steps)
