"""Which heads of a finished model retrieve: they attend to a fact while the model says it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.core.scene import Scene
from regard.importance.retrieval import Count
from regard.plan import Plan, Step
from regard.probes.retrieval import Retrieval
from regard.tasks.needle import Question


def retrieval_scores(
    model: Any, questions: Iterable[Question], *, count: Count = "set", recall: float = 0.5
) -> Tensor:
    """Mean retrieval score (L, H) of the decoder's heads while it answers questions greedily; only
    questions of whose answer it says more than `recall` count.

    Raises:
        ArgumentError: there is no such question.
    """
    scene = Scene.of(model, [question.passage() for question in questions])
    found: dict[int, list[Tensor]] = {}
    for _, site, finding in Retrieval(count, recall).run(scene):
        found.setdefault(site.layer, []).append(finding.metrics["retrieval"])
    if not found:
        raise ArgumentError("questions", "one question or more", 0)
    return torch.stack([torch.cat(scores).nanmean(0) for scores in found.values()]).float()


def silencing_plan(heads: Iterable[tuple[int, int]]) -> Plan:
    """The plan in which these heads, (layer, head), attend to all they see alike."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    return Plan(
        name="without retrieval",
        steps=tuple(
            Step(treatment="uniform_heads", layers=(layer,), heads=tuple(sorted(mine)))
            for layer, mine in sorted(by_layer.items())
        ),
    )


def split_plan(scores: Tensor, kv_heads: int, full: int, sinks: int = 4, recent: int = 32) -> Plan:
    """The plan in which the `full` key heads with the highest score of any of their query heads,
    (L, H) in all, keep everything, and the others the first `sinks` and newest `recent` tokens.

    Raises:
        ArgumentError: more key heads than there are.
    """
    layers, heads = scores.shape
    grouped = scores.view(layers, kv_heads, heads // kv_heads).amax(-1)
    if not 0 <= full <= grouped.numel():
        raise ArgumentError("full", f"0 to {grouped.numel()}", full)
    order = grouped.flatten().argsort(descending=True, stable=True)[:full].tolist()
    steps = []
    for layer in range(layers):
        rest = tuple(h for h in range(kv_heads) if layer * kv_heads + h not in order)
        if rest:
            options = {"sinks": sinks, "recent": recent}
            steps.append(Step(treatment="stream", options=options, layers=(layer,), kv_heads=rest))
    return Plan(name="retrieval and streaming heads", steps=tuple(steps))
