"""The loop of recipes that train a model, through accelerate: one device or many, no other code.

    accelerate launch --num_processes 8 SCRIPT          SCRIPT calls a recipe, as on one device

A lesson is a module that holds the model it teaches: its forward takes a batch, keyword arguments
of the model's forward, and gives losses by name, whose sum is made smaller. So whatever wraps the
lesson to train on many devices sees the whole forward, distillation included. Every process takes
its own batches from the stream, in turn; a step is one batch per process. What a lesson holds moves
to the device that accelerate chooses, and stays there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mode import in_mode

WARM_UP = 0.1  # part of the steps in which the learning rate rises; then it falls linearly to zero
Batches = Iterable[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Progress:
    """A step of training: its number, and its losses by name, of the first process."""

    done: int
    losses: Mapping[str, float]


Watch = Callable[[Progress], None]


def trained(
    lesson: nn.Module,
    batches: Batches,
    steps: int,
    *,
    rate: float,
    decay: float = 0.0,
    clip: float = 1.0,
    groups: Iterable[Mapping[str, Any]] = (),
    watch: Watch | None = None,
) -> None:
    """Train what of a lesson wants gradients, for some steps of AdamW. decay: of weights. clip:
    largest norm of the gradient. groups: parameters with a learning rate, or a sign, of their own,
    as optimisers of torch take them; all others learn at `rate`.

    Raises:
        ArgumentError: no steps, a rate that is not above zero, or too few batches.
        UnsupportedError: accelerate is missing.
    """
    if steps < 1 or not 0 < rate < math.inf:
        raise ArgumentError("steps, rate", "numbers above 0", (steps, rate))
    accelerator = _accelerator()
    own = [dict(group) for group in groups]
    known = {id(p) for group in own for p in group["params"]}
    rest = [p for p in lesson.parameters() if p.requires_grad and id(p) not in known]
    optimiser = torch.optim.AdamW([*own, {"params": rest}], rate, weight_decay=decay)
    first = [group["lr"] for group in optimiser.param_groups]
    held, optimiser = accelerator.prepare(lesson, optimiser)
    source = islice(batches, accelerator.process_index, None, accelerator.num_processes)
    for done in range(steps):
        batch = next(source, None)
        if batch is None:
            raise ArgumentError("batches", f"{steps} batches for each process", done)
        for group, top in zip(optimiser.param_groups, first, strict=True):
            group["lr"] = top * factor(done, steps)
        losses = held(_sent(batch, accelerator.device))
        optimiser.zero_grad()
        accelerator.backward(torch.stack(list(losses.values())).sum())
        accelerator.clip_grad_norm_(rest, clip)
        optimiser.step()
        if watch is not None and accelerator.is_main_process:
            watch(Progress(done + 1, {name: x.item() for name, x in losses.items()}))
    optimiser.zero_grad()
    accelerator.free_memory()


def factor(done: int, steps: int) -> float:
    """What the learning rate is multiplied by: up, then down."""
    ramp = max(1, round(steps * WARM_UP))
    return min((done + 1) / ramp, (steps - done) / max(1, steps - ramp))


def _accelerator() -> Any:
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        lacks = "accelerate is missing (pip install 'regard[train]')"
        raise UnsupportedError("training", lacks) from error
    # a lesson on attention leaves the last layer's other parts without gradients
    return Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])


def _sent(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in batch.items()}


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in evaluation mode and learns nothing; afterwards as before."""
    wanting = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        with in_mode(model, False):
            yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)
