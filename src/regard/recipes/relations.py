r"""Relations inside a layer's attention: which tokens are alike by its queries, keys or values.

    R(X, Y) = softmax(X Y^T s) over the keys that each token may see        (B,A,N,N)

s is 1/sqrt(d), or for queries with keys the layer's own. Heads can be joined and split anew, into
as many as another model is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.core.model_scores import finished
from regard.core.moment import Moment
from regard.core.scene import Scene
from regard.core.treatment import Treatment
from regard.core.weights import group_scores, repeat_heads
from regard.recipes.losses import inputs_of

Relation = Literal["qk", "qq", "kk", "vv"]
RELATIONS = ("qk", "qq", "kk", "vv")


@dataclass(frozen=True, eq=False)
class States:
    """What enters a layer's attention: q (B,H,N,D), k and v (B,H_k,N,D); visible (B,h or 1,N,N),
    and which tokens are no padding (B,N). scale, softcap, bias: of the layer's own scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor
    real: Tensor
    scale: float | None = None
    softcap: float | None = None
    bias: Tensor | None = None

    def relation(self, name: Relation, heads: int | None = None) -> Tensor:
        """Logarithms (B,A,N,N) of a relation, far below zero for what is not seen. heads: joined
        and split into so many.

        Raises:
            ArgumentError: a width that so many heads do not divide.
        """
        x, y = (getattr(self, part) for part in name)
        own = name == "qk" and heads is None
        if heads is not None:
            if name == "qk":
                y = repeat_heads(y, x.shape[1])
            x, y = (split(part, heads) for part in (x, y))
        scale = self.scale if own and self.scale is not None else x.shape[-1] ** -0.5
        scores = group_scores(x, y) * scale
        if own:
            scores = finished(scores, self.softcap, self.bias)
        visible = self.visible if own or self.visible.shape[1] == 1 else self.visible[:, :1]
        hidden = torch.finfo(scores.dtype).min / 4
        return scores.masked_fill(~visible, hidden).log_softmax(-1)


def split(x: Tensor, heads: int) -> Tensor:
    """(B,H,N,D) joined and split anew: (B,heads,N,H D / heads).

    Raises:
        ArgumentError: heads does not divide the width.
    """
    joined = x.transpose(1, 2).flatten(2)
    if heads < 1 or joined.shape[-1] % heads:
        raise ArgumentError("relation_heads", f"a divisor of {joined.shape[-1]}", heads)
    return joined.unflatten(-1, (heads, -1)).transpose(1, 2)


def relation_loss(teacher: Tensor, student: Tensor, real: Tensor) -> Tensor:
    """KL(teacher || student) of relations, logarithms (B,A,N,N), in nats: the mean over heads, real
    queries (B,N) and sequences.

    Raises:
        ArgumentError: different numbers of heads or tokens.
    """
    if teacher.shape != student.shape:
        wanted = f"the teacher's {tuple(teacher.shape)}, or relation_heads to split both alike"
        raise ArgumentError("relations", wanted, tuple(student.shape))
    found = (teacher.exp() * (teacher - student)).sum(-1).mean(1)
    return (found.masked_fill(~real, 0.0).sum(-1) / real.sum(-1)).mean()


@dataclass(frozen=True, eq=False)
class Captured(Treatment):
    """Changes nothing; leaves what enters attention in `states`, by site."""

    states: dict[str, States] = field(default_factory=dict)

    def inputs(self, at: Moment) -> tuple[Tensor, Tensor, Tensor]:
        visible = at.seen() & at.real[:, :1, None]
        self.states[at.site.name] = States(
            at.q, at.k, at.v, visible, at.query_real, at.scale, at.softcap, at.bias
        )
        return at.q, at.k, at.v


def states_of(model: Any, batch: Mapping[str, Tensor], layer: int) -> States:
    """What enters the attention of one layer of a model's self-attention, negative from the end."""
    scene, captured = Scene.of(model, ()), Captured()
    site = scene.chain[layer]
    with scene.treated(captured, site):
        getattr(model, "base_model", model)(**inputs_of(batch))
    return captured.states[site.name]
