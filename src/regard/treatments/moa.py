r"""MoA: each head sees the first block and a window of its own, which grows with the prompt by a
rule of two numbers.

    window(N) = alpha + beta N, in whole blocks        N: tokens of the prompt

The prompt is read through blocks: a query sees as many of them as the window holds, its own
included, and the first `sinks`. Afterwards the window stands still: a cache keeps the first `sinks`
blocks and the last window(N) tokens, evicted at each step. A plan gives heads with different rules
different steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.card import Claim, Golden, Paper
from regard.core.errors import UnsupportedError
from regard.core.evicting import prompt_held
from regard.core.frame import Frame
from regard.core.incoming import bare
from regard.core.model_scores import attend_through
from regard.core.moment import Held, Moment, Site
from regard.core.treatment import Coincides, Treatment, TreatmentCard, Trial
from regard.importance.influence import influence
from regard.importance.observed import observed_weights
from regard.importance.recency import kept_near, seen_near
from regard.masks.elastic import Elastic


@dataclass(frozen=True)
class MoA(Treatment):
    """alpha: tokens, below 0 for a window that opens late. beta: fraction of the prompt. block:
    tokens per block. sinks: first blocks that stay. The window is at least one block.
    """

    alpha: float
    beta: float
    block: int = 64
    sinks: int = 1

    def __post_init__(self) -> None:
        _ = self.mask

    @property
    def mask(self) -> Elastic:
        """What the prompt is read through.

        Raises:
            ArgumentError: numbers that are not finite, or a block below 1.
        """
        return Elastic(self.alpha, self.beta, self.block, self.sinks)

    def check(self, site: Site, heads: tuple[int, ...]) -> None:
        if not site.causal:
            raise UnsupportedError("moa", f"{site.name} is not causal self-attention")

    def attention(self, at: Moment) -> Tensor | None:
        if at.phase == "decode" or at.call is None:
            return None
        return attend_through(at, at.call, self.mask)

    def visible(self, at: Moment) -> Tensor | None:
        if at.call is None and at.q.shape[2] == 1:
            return None  # whatever was not evicted is near
        return seen_near(at, self._window(at), self.sinks * self.block)

    def keep(self, held: Held) -> Tensor:
        if held.phase == "prefill":
            held.memory["prompt"] = held.length
        return kept_near(held, self._window(held), self.sinks * self.block)

    def _window(self, at: Moment | Held) -> Tensor:
        """Tokens of the window (B,), by the length of the prompt."""
        return self.mask.band(at.memory.get("prompt", at.length)) * self.block


LAYOUTS = (
    (0, 0.25, 512),
    (0, 0.25, 1024),
    (-128, 0.5, 512),
    (-128, 0.5, 768),
    (1024, 0.25, 2048),
)
"""The rules (alpha, beta, N) whose layouts every case of the golden file holds."""


def layout(rule: Elastic, length: int) -> Tensor:
    """Blocks that a sequence of this length sees, boolean (nq, nk)."""
    positions = torch.arange(length)[None]
    return rule.blocks(Frame(1, 1, positions, positions), rule.block).some[0, 0]


def replay(case: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' layouts and influence of one golden case."""
    inputs = case["inputs"]
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    weights = observed_weights(prompt_held(bare(q, k, v)), q.shape[2])
    weights.requires_grad_()
    (gradients,) = torch.autograd.grad(weights @ v, weights, inputs["grad_out"])
    return {
        "layouts": [layout(Elastic(alpha, beta), n) for alpha, beta, n in LAYOUTS],
        "influence": influence(weights.detach(), gradients),
        "A": weights.detach(),
        "grad_A": gradients,
    }


CARD = TreatmentCard(
    name="moa",
    build=MoA,
    papers=(
        Paper(
            "2406.14909",
            "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
            2024,
        ),
    ),
    claim=Claim(
        "heads with windows of their own keep what one window of the same cost for all loses",
        "regard evaluate --plan moa.json --plan stream.json --task needle,perplexity",
    ),
    example=Trial({"alpha": -2, "beta": 0.3, "block": 2, "sinks": 1}),
    limits=(
        Coincides({"alpha": 10_000, "beta": 0}),
        Coincides(
            {"alpha": 6, "beta": 0, "block": 1, "sinks": 2},
            "stream",
            {"sinks": 2, "recent": 6, "window": True},
        ),
    ),
    goldens=(Golden("53_moa.pt", replay, "https://github.com/thu-nics/MoA", "e224fe3e00"),),
)
