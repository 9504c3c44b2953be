r"""Elastic rules: windows that grow with the prompt, and what each hides of what the loss feels.

    window(N) = alpha + beta N        loss[g, rule] = sum of |E| over the blocks that it hides

E (N,N) is the influence on the loss of each pair of query and key (importance/influence.py), of a
sequence of one length, pooled over square blocks and added up over the query heads of a key head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.moment import Site
from regard.core.passage import Passage
from regard.importance.influence import block_influence, influence
from regard.lenses.gradient_attention import gradient_attention
from regard.masks.elastic import Elastic
from regard.searchers.judging import predicted, whole
from regard.searchers.rules import Rule
from regard.searchers.solver import Numbers
from regard.treatments.moa import layout

ROUNDING = 1e-9


@dataclass(frozen=True)
class ElasticRule(Rule):
    """A rule whose share of the tokens depends on the length."""

    @property
    def mask(self) -> Elastic:
        """What it lets a query see."""
        return Elastic(**self.options)

    def kept(self, length: int) -> int:
        blocks = int(self.mask.band(torch.tensor(length))) + self.mask.sinks
        return min(length, blocks * self.mask.block)


def elastic_rules(
    profiled: Sequence[int],
    *,
    block: int = 64,
    sinks: int = 1,
    step: int | None = None,
    slopes: int = 9,
) -> tuple[Rule, ...]:
    """Rules with windows above nothing at the shortest profiled length and no longer than the
    prompt at the longest, and so at any beyond it. step: tokens between two alphas (None: an eighth
    of the longest length); slopes: betas from 0 to 1. The window of the whole prompt is the
    untouched head.

    Raises:
        ArgumentError: lengths, a step or slopes out of range.
    """
    if not profiled or min(profiled) < 1:
        raise ArgumentError("lengths", "one or more, of at least 1 token", tuple(profiled))
    short, long = min(profiled), max(profiled)
    step = max(1, long // 8) if step is None else step
    if step < 1 or slopes < 2:
        raise ArgumentError("step, slopes", "step >= 1 and slopes >= 2", (step, slopes))
    alphas = np.linspace(-short, long, (long + short) // step + 1)
    found = []
    for alpha, beta in product(alphas.tolist(), np.linspace(0, 1, slopes).tolist()):
        if alpha + beta * long > long + ROUNDING or alpha + beta * short <= ROUNDING:
            continue
        options = {"alpha": alpha, "beta": beta, "block": block, "sinks": sinks}
        found.append(Rule(None) if beta == 1 and alpha == 0 else ElasticRule("moa", options))
    return tuple(found)


def span_losses(effects: Tensor, rules: Sequence[Rule], length: int, block: int) -> Numbers:
    """What each rule hides (G,C) of effects (G,nb,nb) at a length; no more than rounding below 0.

    Raises:
        ArgumentError: effects of another length.
    """
    blocks = -(-length // block)
    if effects.shape[1:] != (blocks, blocks):
        raise ArgumentError("effects", f"(G,{blocks},{blocks})", tuple(effects.shape))
    every = torch.ones(blocks, blocks, dtype=torch.bool)
    seen = [layout(r.mask, length) if isinstance(r, ElasticRule) else every for r in rules]
    hidden = ~torch.stack(seen)
    return torch.einsum("gij,cij->gc", effects.double(), hidden.double()).numpy()


def span_effects(
    model: Any, sites: Sequence[Site], passages: Sequence[Passage], block: int
) -> Tensor:
    """|E| (G,nb,nb) of the key heads of some layers, by one forward and backward per passage, as a
    mean over sequences, all of one length and without padding. The loss is that of what is scored.

    Raises:
        ArgumentError: lengths that differ.
        UnsupportedError: padding, or passages without anything to predict.
    """
    total, count = torch.zeros(()), 0
    for passage in map(whole, passages):
        if passage.padding is not None and not bool(passage.padding.all()):
            raise UnsupportedError("elastic_spans", "blocks of padded passages do not line up")
        names = [site.name for site in sites]
        loss = _summed(model, passage)
        calls = {c.site: c for c in gradient_attention(model, loss, names)}
        effects = []
        for site in sites:
            call = calls[site]
            assert call.gradient is not None
            exact = torch.promote_types(call.weights.dtype, torch.float32)
            effect = influence(call.weights.to(exact), call.gradient.to(exact))
            pooled = block_influence(effect, block)
            effects.append(pooled.unflatten(1, (site.kv_heads, -1)).sum((0, 2)).cpu())
        found = torch.cat(effects).double()
        if count and found.shape != total.shape:
            raise ArgumentError("passages", "one length", (found.shape[1], total.shape[1]))
        total, count = total + found, count + len(calls[sites[0]].weights)
    return total / max(count, 1)


def _summed(model: Any, passage: Passage) -> Any:
    """The sum of a passage's losses, when it is called."""
    return lambda: predicted(model, passage).losses().nansum()
