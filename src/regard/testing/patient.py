"""A treatment's card on its tiny model: forwards and decoding, with and without the plan."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from regard.core.treatment import TreatmentCard
from regard.plan import Plan, Step
from regard.testing.tiny import prompt, tiny_decoder, tiny_encoder

STEPS = 6
"""Tokens decoded after the prompt."""


@dataclass(frozen=True, eq=False)
class Patient:
    """A card's example on its tiny model."""

    card: TreatmentCard

    @cached_property
    def model(self) -> Any:
        return tiny_encoder() if self.card.example.model == "encoder" else tiny_decoder()

    @property
    def decodes(self) -> bool:
        return self.card.example.model == "decoder"

    @property
    def ids(self) -> Tensor:
        return prompt(self.card.example.length, batch=2)

    def plan(
        self,
        options: Mapping[str, Any] | None = None,
        layers: tuple[int, ...] | None = None,
        heads: tuple[int, ...] | None = None,
    ) -> Plan:
        """A plan of one step: the example, or other options, everywhere or where it is said."""
        chosen = dict(self.card.example.options if options is None else options)
        where = self.card.example.layers if layers is None else layers
        step = Step(treatment=self.card.name, options=chosen, layers=where, heads=heads)
        return Plan(steps=(step,))

    def logits(self, plan: Plan | None, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B,N,V) of one forward without a cache."""
        context: AbstractContextManager[Any] = nullcontext()
        if plan is not None:
            context = plan.applied(self.model)
        with context, torch.no_grad():
            extra = {"use_cache": False} if self.decodes else {}
            return self.model(ids, attention_mask=mask, **positions_of(mask), **extra).logits

    def decoded(
        self,
        plan: Plan | None,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        chunks: tuple[int, ...] = (1,) * STEPS,
        masked_only: bool = False,
    ) -> Tensor:
        """Logits of the last prompt token and of what follows, fed in chunks, (B, 1 + sum, V)."""
        mask = torch.ones_like(ids) if mask is None else mask
        later = prompt(sum(chunks), batch=len(ids), seed=2)
        context: AbstractContextManager[Any] = nullcontext()
        if plan is not None:
            context = plan.applied(self.model, masked_only=masked_only)
        with context, torch.no_grad():
            out = self.model(ids, attention_mask=mask, use_cache=True, **positions_of(mask))
            last = mask.cumsum(-1).argmax(-1)
            found = [out.logits[torch.arange(len(ids)), last][:, None]]
            start = 0
            for size in chunks:
                mask = torch.cat([mask, mask.new_ones(len(ids), size)], 1)
                positions = mask.cumsum(-1)[:, -size:] - 1
                out = self.model(
                    later[:, start : start + size],
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=out.past_key_values,
                    use_cache=True,
                )
                found.append(out.logits)
                start += size
        return torch.cat(found, 1)


def positions_of(mask: Tensor | None) -> dict[str, Tensor]:
    """Position ids of a padded batch, as keywords: the number of real tokens before each."""
    if mask is None:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
