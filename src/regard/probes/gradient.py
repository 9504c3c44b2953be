r"""Gradient: how much the loss feels a gate on a head's output.

    o_h <- xi_h o_h        I_h = |dL/dxi_h| at xi = 1        dL/dxi_h = sum_n <o_hn, dL/do_hn>

One backward pass serves all heads. The derivative itself, less its sign, says to first order what
the loss gains when the head is silenced: L(0) - L(1) ~ -dL/dxi_h.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import UnsupportedError
from regard.core.moment import Moment, Site
from regard.core.passage import Passage
from regard.core.predictions import Predictions
from regard.core.probe import Finding, ProbeCard
from regard.core.scene import Scene
from regard.core.treatment import Treatment


@dataclass(frozen=True, eq=False)
class Gates(Treatment):
    """Multiplies each head's output by a gate of 1, (B,H) per module, to derive by."""

    gates: dict[str, Tensor] = field(default_factory=dict)

    def output(self, output: Tensor, at: Moment) -> Tensor:
        gate = output.new_ones(len(output), at.site.heads, requires_grad=True)
        self.gates[at.site.name] = gate
        return output * gate[:, list(at.heads), None, None]


@dataclass(frozen=True)
class Gradient:
    """No options."""

    def run(self, scene: Scene) -> Iterator[tuple[Passage, Site, Finding]]:
        for passage in scene.passages:
            gates = Gates()
            with torch.enable_grad(), scene.treated(gates):
                losses = Predictions.of(scene.model(**passage.inputs), passage).losses()
            slopes = _slopes(losses, gates.gates)
            for site in scene.sites:
                if site.name in slopes:
                    slope = slopes[site.name].double()
                    metrics = {"gradient": slope.abs(), "gradient_cost": -slope}
                    yield passage, site, Finding(metrics)


def _slopes(losses: Tensor, gates: dict[str, Tensor]) -> dict[str, Tensor]:
    """Derivatives (B,H) of each sequence's loss (B,) by the gates of its heads.

    Raises:
        UnsupportedError: the model's forward keeps no gradients.
    """
    if not losses.requires_grad:
        raise UnsupportedError("gradient", "the model's forward keeps no gradients")
    there = ~losses.isnan()
    found = torch.autograd.grad(losses[there].sum(), list(gates.values()))
    gone = ~there[:, None]
    return {n: x.masked_fill(gone, torch.nan) for n, x in zip(gates, found, strict=True)}


CARD = ProbeCard(
    name="gradient",
    build=Gradient,
    metrics={
        "gradient": "size of the loss's derivative by a gate on the head, in nats",
        "gradient_cost": "rise of the loss without the head, to first order, in nats",
    },
    papers=(Paper("1905.10650", "Are Sixteen Heads Really Better than One?", 2019),),
    claim=Claim("one backward pass ranks heads much as ablation does", "regard atlas"),
)
