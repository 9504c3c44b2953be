"""What a plan costs in quality: the loss of answers that are read through the model's cache."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.errors import UnsupportedError
from regard.core.mode import in_mode
from regard.core.passage import Passage
from regard.plan import Plan


@torch.no_grad()
def answer_losses(model: Any, passage: Passage, plan: Plan | None = None) -> Tensor:
    """Negative log-likelihood (B,) of each answer, summed over its tokens (those that are scored),
    in nats: the prompt is read first, then the answer token by token through the cache that is left
    of it, in evaluation mode. `model` is a causal language model of transformers.

    Raises:
        UnsupportedError: a passage without an answer or with a prompt that is padded at its end; a
            model without a cache.
    """
    if passage.answer is None:
        raise UnsupportedError("search", "a passage has no answer to score")
    padding = passage.padding
    if padding is not None and not bool(padding[:, -1].all()):
        raise UnsupportedError("search", "a prompt is padded at its end; pad at its start")
    answer = passage.answer
    with in_mode(model, False), nullcontext() if plan is None else plan.applied(model):
        read = model(**passage.inputs, use_cache=True)
        cache = getattr(read, "past_key_values", None)
        if cache is None:
            raise UnsupportedError("search", f"{type(model).__name__} has no cache")
        logits = [read.logits[:, -1:]]
        if answer.shape[1] > 1:
            logits.append(_continued(model, passage, answer, cache))
    every = torch.cat(logits, 1).float()
    found = F.cross_entropy(every.mT, answer, reduction="none")
    return (found if passage.scored is None else found.masked_fill(~passage.scored, 0.0)).sum(-1)


def _continued(model: Any, passage: Passage, answer: Tensor, cache: Any) -> Tensor:
    """Logits (B,T-1,V) after each token of the answer but the last, each read by itself, since a
    cache may let go of keys at every step.
    """
    mask, found = passage.inputs.get("attention_mask"), []
    for step in range(answer.shape[1] - 1):
        given: dict[str, Any] = {"input_ids": answer[:, step : step + 1], "past_key_values": cache}
        if mask is not None:
            given["attention_mask"] = F.pad(mask, (0, step + 1), value=1)
        read = model(**given, use_cache=True)
        cache = read.past_key_values
        found.append(read.logits)
    return torch.cat(found, 1)


def mean_loss(model: Any, passages: Sequence[Passage], plan: Plan | None = None) -> float:
    """Mean of `answer_losses` over the sequences of all passages."""
    return float(torch.cat([answer_losses(model, p, plan) for p in passages]).double().mean())
