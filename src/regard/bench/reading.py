"""Reading a text through a model's cache, and answering from it."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from regard.plan import Plan


class Reading:
    """What a model has read so far, as its cache. `model` is a causal language model of
    transformers; rows are read side by side and have no padding.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache: Any = None
        takes = inspect.signature(model.forward).parameters
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """Read ids (B,n) after what was read before; logits (B,V) of what comes next."""
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **self.options)
        self.cache = out.past_key_values
        return out.logits[:, -1]

    def answer(self, ids: Tensor, count: int) -> Tensor:
        """Read ids, then choose `count` tokens (B,count), each the likeliest; the last one chosen
        is not read yet.
        """
        chosen = []
        for _ in range(count):
            ids = self.read(ids).argmax(-1, keepdim=True)
            chosen.append(ids)
        return torch.cat(chosen, 1)


def under(plan: Plan | None, model: Any) -> AbstractContextManager[Any]:
    """The model under a plan; as it is, without one."""
    return nullcontext() if plan is None else plan.applied(model)
