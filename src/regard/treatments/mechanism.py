r"""Mechanism: chosen heads compute any operator of the library that has no parameters, in place of
softmax attention.

    o = operator(q, k, v)        q (B,h,N,D), k (B,h_k,M,D), v (B,h_k,M,E), as the model made them

`operator` names a card of `regard list`, `options` are its own. Sparse and approximate attention
for a pretrained model, for instance:

    {"operator": "power_attention", "options": {"block": 64, "window": 5, "sinks": 1}}
    {"operator": "s2_attention", "options": {"block": 64, "local": 16, "stride": 8}}
    {"operator": "cca", "options": {"group": 16, "local": 1024}}
    {"operator": "block_topk", "options": {"block": 64, "keep": 16}}
    {"operator": "pyramid_sparse", "options": {"block": 128}}, with "phases": ["prefill"]
    {"operator": "hyper_attention", "options": {"exact_below": 4096}}, with "phases": ["prefill"]
    {"operator": "paro", "options": {"density": 0.5}, "grid": [16, 16]}, in a vision model

An operator that reads cached keys decodes from the model's cache; one with a decode state (cca)
gets the new tokens and its state, which lives beside the cache; one that cannot decode serves the
prompt alone, and a step must say so: `"phases": ["prefill"]`. Heads are numbered as the step
chooses them, so a pattern that differs from head to head (s2_attention) starts at the first chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Paper
from regard.core.catalog import card
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mask import Causal
from regard.core.moment import Moment, Phase, Site
from regard.core.treatment import Coincides, Treatment, TreatmentCard, Trial


@dataclass(frozen=True)
class Mechanism(Treatment):
    """operator: name of a card. options: of that operator, by name; lists stand for tuples. grid,
    prefix: for operators on images and videos, the sides of the grid of tokens, and how many stand
    before it.
    """

    operator: str
    options: Mapping[str, Any] = field(default_factory=dict)
    grid: tuple[int, ...] | None = None
    prefix: int = 0

    def __post_init__(self) -> None:
        known = sorted(self.card.options)
        for name in self.options:
            if name not in known:
                raise ArgumentError(f"options of {self.operator}", f"some of {known}", name)

    @property
    def card(self) -> Card:
        """The operator's card.

        Raises:
            UnknownNameError: there is none of that name.
            UnsupportedError: it is a layer, or has parameters that nothing has trained.
        """
        found = card(self.operator)
        if found.kind != "operator" or isinstance(found.build, type):
            raise UnsupportedError(
                f"mechanism({self.operator})",
                "it has parameters of its own; only operators without any fit a finished model",
            )
        return found

    @property
    def serves(self) -> frozenset[Phase]:
        decodes = self.card.causal and self.card.cost.state != "none"
        return frozenset(("prefill", "decode") if decodes else ("prefill",))

    def check(self, site: Site, heads: tuple[int, ...]) -> None:
        """Run the operator once, on a few tokens of nothing."""
        who = f"mechanism({self.operator})"
        if site.cross:
            raise UnsupportedError(who, f"{site.name} is cross attention")
        pattern = "causal self" if site.causal else "noncausal self"
        if pattern not in self.card.patterns:
            raise UnsupportedError(who, f"{site.name} is {pattern}; it serves {self.card.patterns}")
        axes = 1 if self.grid is None else len(self.grid)
        if axes not in self.card.grids:
            raise UnsupportedError(
                who, f"it serves grids of {self.card.grids} axes; say which by the option grid"
            )
        tokens = 3 if self.grid is None else self.prefix + prod(self.grid)
        x = torch.zeros(1, len(heads), tokens, 8)
        try:
            self.run(x, x, x, self.placed(Call(mask=Causal() if site.causal else None)))
        except TypeError as error:
            raise ArgumentError(f"options of {self.operator}", "valid types", error) from error

    @property
    def run(self) -> partial[Result]:
        """The operator with its options, as a function of (q, k, v, call)."""
        return partial(self.card.build, **{name: _tuples(x) for name, x in self.options.items()})

    def attention(self, at: Moment) -> Tensor:
        who = f"mechanism({self.operator})"
        if at.call is None:
            raise UnsupportedError(who, "its keys were evicted; let it act in the prompt alone")
        if at.softcap is not None or at.bias is not None:
            raise UnsupportedError(who, "the model caps or biases its scores")
        n, real = at.q.shape[2], at.call.padding
        standard = at.scale == at.q.shape[-1] ** -0.5
        call = self.placed(at.call).but(
            scale=None if standard else at.scale,
            query_padding=None if real is None else real[:, -n:],
        )
        if not (self.card.carries_state and self.card.causal and at.site.causal):
            return self.run(at.q, at.k, at.v, call).output
        return self._continued(at, call, who)

    def placed(self, call: Call) -> Call:
        """The call with the grid, if there is one, whose cells are then the positions."""
        if self.grid is None:
            return call
        places = {"query_positions": None, "key_positions": None}
        return call.but(grid=self.grid, prefix=self.prefix, **places)

    def _continued(self, at: Moment, call: Call, who: str) -> Tensor:
        """The new tokens alone, after the state of those before; one state per set of heads."""
        name, n = f"state of heads {at.heads}", at.q.shape[2]
        state = at.memory.get(name)
        if at.phase == "decode" and state is None:
            raise UnsupportedError(who, "it carries a state from the prompt, which it did not see")
        call = call.but(padding=call.query_padding, key_positions=call.query_positions)
        result = self.run(at.q, at.k[:, :, -n:], at.v[:, :, -n:], call, state=state)
        at.memory[name] = result.state
        return result.output


def _tuples(x: Any) -> Any:
    """JSON has no tuples."""
    return tuple(_tuples(part) for part in x) if isinstance(x, list) else x


CARD = TreatmentCard(
    name="mechanism",
    build=Mechanism,
    papers=(
        Paper(
            "2503.03588",
            "PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse "
            "Attention",
            2025,
        ),
        Paper(
            "2407.17678",
            "S2-Attention: Hardware-Aware Context Sharding Among Attention Heads",
            2024,
        ),
        Paper(
            "2412.12465", "Core Context Aware Transformers for Long Context Language Modeling", 2024
        ),
    ),
    claim=Claim(
        "a static pattern keeps some heads' work at a fraction of the pairs, and costs recall in "
        "the heads that retrieve",
        "regard evaluate --plan power.json --task needle,perplexity",
    ),
    example=Trial({"operator": "power_attention", "options": {"block": 2, "window": 1}}),
    limits=(
        Coincides({"operator": "softmax"}),
        Coincides({"operator": "sliding_window", "options": {"window": 10_000}}),
        Coincides({"operator": "s2_attention", "options": {"stride": 1}}),
        Coincides({"operator": "cca", "options": {"group": 1, "local": 2}}),
        Coincides({"operator": "block_topk", "options": {"keep": 10_000}}),
    ),
)
