"""Which heads of a finished model retrieve: they attend to a fact while the model says it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.core.hosting import host_of
from regard.core.incoming import Chosen
from regard.core.model_scores import finished
from regard.core.moment import Moment
from regard.core.treatment import Treatment
from regard.core.weights import group_scores
from regard.importance.retrieval import Count, retrieval_score
from regard.plan import Plan, Step
from regard.tasks.needle import Question


@dataclass(frozen=True, eq=False)
class _Most(Treatment):
    """Notes the key that the newest query of each head attends to most; changes nothing."""

    seen: dict[int, list[Tensor]] = field(default_factory=dict)

    def attention(self, at: Moment) -> None:
        bias = None if at.bias is None else at.bias[:, :, -1:]
        scores = finished(group_scores(at.q[:, :, -1:], at.k) * at.scale, at.softcap, bias)
        scores = scores[:, :, 0].masked_fill(~at.seen()[:, :, -1], float("-inf"))
        self.seen.setdefault(at.site.layer, []).append(scores.argmax(-1))


@torch.no_grad()
def retrieval_scores(
    model: Any, questions: Iterable[Question], *, count: Count = "set", recall: float = 0.5
) -> Tensor:
    """Mean retrieval score (L, H) of the decoder's heads while it answers questions greedily; only
    questions of whose answer it says more than `recall` count.

    Raises:
        ArgumentError: there is no such question.
    """
    total, asked = torch.zeros(()), 0
    for question in questions:
        most, said = _answered(model, question)
        good = (said == question.answer).float().mean(-1) > recall
        if not bool(good.any()):
            continue
        places = torch.arange(question.prompt.shape[1])
        first = question.place[:, None]
        needle = (places >= first) & (places < first + question.answer.shape[1])
        scores = retrieval_score(most, question.prompt, said, needle, count)
        total, asked = total + scores[good].sum(0), asked + int(good.sum())
    if not asked:
        raise ArgumentError("questions", f"one that is answered to more than {recall:.0%}", asked)
    return total / asked


def _answered(model: Any, question: Question) -> tuple[Tensor, Tensor]:
    """The keys attended to most (B,T,L,H) and the answer (B,T)."""
    host, watch = host_of(model), _Most()
    sites = [s for s in host.sites(model) if s.causal and not s.cross]
    both = frozenset(("prefill", "decode"))
    steps = {s.name: [Chosen(0, watch, tuple(range(s.heads)), both)] for s in sites}
    length = question.answer.shape[1]
    with host.run(model, steps):
        out = model.generate(
            question.prompt,
            attention_mask=torch.ones_like(question.prompt),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            pad_token_id=0,
        )
    layers = [torch.stack(watch.seen[s.layer], 1) for s in sites]
    return torch.stack(layers, 2), out[:, question.prompt.shape[1] :]


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
