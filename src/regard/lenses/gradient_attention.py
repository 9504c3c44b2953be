r"""Gradient times attention: which of a head's weights a score would miss.

    G = A * dS/dA                    per head, (B,H,N,M)
    R <- R + mean_h(max(G, 0)) R     over the layers of a tower, from R = I

G is what S loses, to first order, without a weight; R how much of each query of the last layer
comes from each token (for self-attention; arXiv 2103.15679). Weights are those of every attention
module that a host reaches, kept with their gradients.

    calls = gradient_attention(model, lambda: model(ids).logits[:, -1, answer])
    rolled(calls)[:, -1]          # (B,N): what the last token draws on
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.errors import ArgumentError
from regard.core.moment import Moment, Site
from regard.core.scene import Scene
from regard.core.treatment import Treatment


@dataclass(frozen=True, eq=False)
class Attended:
    """One attention call: weights (B,H,N,M), values (B,H_k,M,E), and, where one was asked for, the
    gradient of the score with respect to the weights.
    """

    site: Site
    weights: Tensor
    values: Tensor
    gradient: Tensor | None = None

    @property
    def product(self) -> Tensor:
        """Gradient times weights, (B,H,N,M).

        Raises:
            ArgumentError: the call was kept without a gradient.
        """
        if self.gradient is None:
            raise ArgumentError("gradient", "calls of gradient_attention", None)
        return self.weights * self.gradient


@dataclass(frozen=True, eq=False)
class Keep(Treatment):
    """Changes nothing; keeps what passes, in the order of the calls."""

    calls: list[Attended] = field(default_factory=list)

    def weights(self, weights: Tensor, at: Moment) -> Tensor:
        if torch.is_grad_enabled() and not weights.requires_grad:
            weights = weights.detach().requires_grad_()
        self.calls.append(Attended(at.site, weights, at.v.detach()))
        return weights


def attention_of(
    model: nn.Module, forward: Callable[[], Any], sites: Sequence[str] = ()
) -> list[Attended]:
    """Weights and values of every attention call while `forward` runs the model, in order. sites:
    names of the modules wanted; none: all. A plan in force on the model does not act on them
    meanwhile; calls on a filled cache are left out.

    Raises:
        UnsupportedError: no attention is reached.
        ArgumentError: a name no site has.
    """
    scene = Scene.of(model, ())
    wanted = [site for site in scene.sites if not sites or site.name in sites]
    if len(wanted) < len(sites):
        raise ArgumentError("sites", f"some of {[s.name for s in scene.sites]}", sites)
    keep = Keep()
    with scene.treated(keep, *wanted):
        forward()
    return keep.calls


def gradient_attention(
    model: nn.Module, score: Callable[[], Tensor], sites: Sequence[str] = ()
) -> list[Attended]:
    """The same with gradients. score: runs the model and gives (B,) or a scalar. A call on which
    the score does not depend has a gradient of zeros.

    Raises:
        ArgumentError: a score that does not depend on attention at all, or a name no site has.
        UnsupportedError: no attention is reached.
    """
    scores: list[Tensor] = []
    with torch.enable_grad():
        calls = attention_of(model, lambda: scores.append(score()), sites)
        if not calls or not scores[0].requires_grad:
            raise ArgumentError("score", "something that depends on attention", scores[0])
        weights = [call.weights for call in calls]
        found = torch.autograd.grad(scores[0].sum(), weights, materialize_grads=True)
    return [
        Attended(call.site, call.weights.detach(), call.values, gradient)
        for call, gradient in zip(calls, found, strict=True)
    ]


def rolled(calls: Sequence[Attended]) -> Tensor:
    """Relevance (B,N,N) of each token (columns) to each query of the last layer (rows), over calls
    of self-attention of one tower, first layer first.

    Raises:
        ArgumentError: no call, cross-attention, calls of several towers or sizes.
    """
    towers = {call.site.tower for call in calls}
    shapes = {tuple(call.weights.shape[-2:]) for call in calls}
    square = all(n == m for n, m in shapes)
    if len(towers) != 1 or len(shapes) != 1 or not square or calls[0].site.cross:
        raise ArgumentError("calls", "self-attention of one tower", (sorted(towers), shapes))
    n = calls[0].weights.shape[-1]
    total = torch.eye(n).to(calls[0].weights).expand(calls[0].weights.shape[0], n, n)
    for call in calls:
        total = total + call.product.clamp(min=0).mean(1) @ total
    return total
