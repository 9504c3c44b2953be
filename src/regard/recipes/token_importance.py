r"""How much tokens matter to a layer whose weights are rounded, by one of several measures.

    attention    what others attend to: sum_h sum_i A_hij        frequency    - how often it occurs
    norm         |x|        change    |f(x) - x|        unlike    mean_i |x_j - x_i|^2
    uniform      all alike        Ends    the first and the last ones, 1 and else 0

x: (N,C) what enters the block f. Padding is given the least of its sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.core.linears import BlockLinears
from regard.core.moment import Moment
from regard.core.probe import add_columns, look_at, zeros
from regard.core.scene import Scene
from regard.core.shown import observed
from regard.core.treatment import Treatment
from regard.recipes.losses import inputs_of, real_of
from regard.recipes.walking import Walk

Importance = Literal["attention", "uniform", "frequency", "norm", "change", "unlike"]
KINDS: tuple[str, ...] = get_args(Importance)
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Ends:
    """So many first real tokens count, and so many last."""

    first: int
    last: int = 0

    def __post_init__(self) -> None:
        if min(self.first, self.last) < 0 or not self.first + self.last:
            raise ArgumentError("first, last", "0 or more, one of them above 0", self)

    def importance(self, real: Tensor) -> Tensor:
        """1 for tokens that count, else 0, of real (B,N)."""
        before, after = real.cumsum(-1), real.flip(-1).cumsum(-1).flip(-1)
        return ((before <= self.first) | (after <= self.last)).double()


@dataclass(frozen=True, eq=False)
class Received(Treatment):
    """Changes nothing; leaves in `mass` what each token (B,N) gets from all heads, by site."""

    mass: dict[str, Tensor] = field(default_factory=dict)

    def output(self, output: Tensor, at: Moment) -> Tensor:
        total = zeros(look_at(at), at.k.shape[2])
        for seen in observed(at):
            add_columns(total, seen, seen.mass)
        self.mass[at.site.name] = total.sum(1)
        return output


@torch.no_grad()
def received_by(model: Any, batch: Batch) -> dict[str, Tensor]:
    """What each token (B,N) of a batch gets from all heads of a layer, by site."""
    received = Received()
    with Scene.of(model, ()).treated(received):
        getattr(model, "base_model", model)(**inputs_of(batch))
    return received.mass


def token_importance(
    kind: Importance | Ends,
    walk: Walk,
    one: BlockLinears,
    batch: Batch,
    received: Mapping[str, Tensor],
) -> Tensor:
    """How much tokens (B,N) matter to a block that a batch is about to enter."""
    x = walk.state.double()
    if isinstance(kind, Ends):
        found = kind.importance(walk.real)
    elif kind == "attention":
        found = received[one.site.name]
    elif kind == "frequency":
        ids = batch["input_ids"].masked_fill(~walk.real, -1)
        found = -(ids[:, :, None] == ids[:, None]).sum(-1).double()
    elif kind == "norm":
        found = x.norm(dim=-1)
    elif kind == "change":
        found = (walk.through(one).double() - x).norm(dim=-1)
    elif kind == "unlike":
        found = _unlike(x, walk.real)
    else:
        found = torch.ones_like(x[..., 0])
    least = found.masked_fill(~walk.real, torch.inf).amin(-1, keepdim=True)
    return torch.where(walk.real, found, least)


def _unlike(x: Tensor, real: Tensor) -> Tensor:
    """Mean squared distance (B,N) of each x (B,N,C) to the real ones (B,N) of its sequence."""
    share = real.to(x.dtype) / real.sum(-1, keepdim=True)
    x = x.masked_fill(~real[..., None], 0.0)
    mean = (share[..., None] * x).sum(1, keepdim=True)
    size = x.square().sum(-1)
    return size + (share * size).sum(-1, keepdim=True) - 2 * (x * mean).sum(-1)


def shifted(batches: Sequence[Batch], times: int) -> list[dict[str, Tensor]]:
    """Each batch, and copies turned round by equal parts of its length, `times` in all, so that
    what matters lies elsewhere.

    Raises:
        ArgumentError: fewer than one, or padding.
    """
    if times < 1 or not all(bool(real_of(batch).all()) for batch in batches):
        raise ArgumentError("times", "at least 1, of sequences without padding", times)
    return [
        {"input_ids": batch["input_ids"].roll(part * batch["input_ids"].shape[1] // times, 1)}
        for batch in batches
        for part in range(times)
    ]
