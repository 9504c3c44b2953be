r"""Losses of training and distillation on tokens: what comes next, a teacher's guess of it, a
teacher's states.

    hard    mean of -log p(target)                 where a target is known
    soft    T^2 mean KL(teacher || student)        of softmax(logits / T), at real tokens
    states  mean ((h - h_teacher)^2)               at real tokens

A batch is keyword arguments of a forward. `targets` (B,N) among them, IGNORED where nothing is
asked, says what each token should predict; without it that is the next real token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.tasks.task import IGNORED, Batch

TARGETS = "targets"


def inputs_of(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keyword arguments of a forward without a cache."""
    return {**{name: x for name, x in batch.items() if name != TARGETS}, "use_cache": False}


def real_of(batch: Mapping[str, Tensor]) -> Tensor:
    """Which tokens are no padding, (B,N)."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def targets_of(batch: Mapping[str, Tensor]) -> Tensor:
    """What each token should predict, (B,N); IGNORED where nothing is asked.

    Raises:
        ArgumentError: nothing is asked anywhere.
    """
    found = batch.get(TARGETS)
    if found is None:
        real = real_of(batch)
        there = F.pad(real[:, 1:] & real[:, :-1], (0, 1))
        found = F.pad(batch["input_ids"][:, 1:], (0, 1)).masked_fill(~there, IGNORED)
    if not bool((found != IGNORED).any()):
        raise ArgumentError("batch", "some token to predict", "none")
    return found


def of_task(batches: Iterable[Batch]) -> Iterator[dict[str, Tensor]]:
    """Batches of a task as keyword arguments."""
    for batch in batches:
        yield {"input_ids": batch.inputs, TARGETS: batch.targets}


def hard_loss(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of logits (B,N,V), in nats."""
    targets = targets_of(batch)
    known = targets != IGNORED
    return F.cross_entropy(_wide(logits[known]), targets[known])


def soft_loss(student: Tensor, teacher: Tensor, real: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean divergence of two predictions, logits (B,N,V), at real tokens (B,N), times T^2.

    Raises:
        ArgumentError: a temperature that is not above zero.
    """
    if not temperature > 0:
        raise ArgumentError("temperature", "a number above 0", temperature)
    logs = [(_wide(x[real]) / temperature).log_softmax(-1) for x in (student, teacher)]
    found = F.kl_div(logs[0], logs[1], reduction="batchmean", log_target=True)
    return found * temperature**2


def state_loss(student: Iterable[Tensor], teacher: Iterable[Tensor], real: Tensor) -> Tensor:
    """Mean square difference of hidden states (B,N,C), over layers and real tokens (B,N).

    Raises:
        ArgumentError: states of other numbers or widths.
    """
    pairs = list(zip(student, teacher, strict=True))
    for own, other in pairs:
        if own.shape != other.shape:
            raise ArgumentError("hidden states", tuple(other.shape).__repr__(), tuple(own.shape))
    return torch.stack([F.mse_loss(_wide(a[real]), _wide(b[real])) for a, b in pairs]).mean()


def _wide(x: Tensor) -> Tensor:
    """In at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
