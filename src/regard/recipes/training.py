"""The loop of recipes that train a model, through accelerate: one device or many, no other code.

    accelerate launch --num_processes 8 SCRIPT          SCRIPT calls a recipe, as on one device

A lesson is a module that holds the model it teaches: its forward takes a batch, keyword arguments
of the model's forward, and gives losses by name, whose sum is made smaller. So whatever wraps the
lesson to train on many devices sees the whole forward, distillation included. Every process takes
its own batches from the stream, in turn; a step is one batch per process, or as many as
`--gradient_accumulation_steps` says. Each batch counts alike, so where all ask for as many tokens,
a step is that of one process on all of them joined. `--mixed_precision` holds for forwards; weights
keep their type. What a lesson holds moves to the device that accelerate chooses, and stays there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mode import in_mode

WARM_UP = 0.1  # part of the steps in which the learning rate rises; then it falls linearly to zero
Batches = Iterable[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Progress:
    """A step of training: its number, and its losses by name, of the first process; where it takes
    several batches, their mean.
    """

    done: int
    losses: Mapping[str, float]


Watch = Callable[[Progress], None]
Schedule = Callable[[int, int], float]


@runtime_checkable
class Paced(Protocol):
    """A lesson that changes as it goes on. done: how many steps came before, which it is told."""

    done: int


def trained(
    lesson: nn.Module,
    batches: Batches,
    steps: int,
    *,
    rate: float,
    decay: float = 0.0,
    clip: float = 1.0,
    schedule: Schedule | None = None,
    groups: Iterable[Mapping[str, Any]] = (),
    watch: Watch | None = None,
) -> None:
    """Train what of a lesson wants gradients, for some steps of AdamW. decay: of weights. clip:
    largest norm of the gradient of what learns at `rate`. schedule: what rates are multiplied by,
    of the steps done and all of them; None: up, then down. groups: parameters with a learning rate,
    or a sign, of their own, as optimisers of torch take them; all others learn at `rate`.

    Raises:
        ArgumentError: no steps, a rate that is not above zero, or too few batches.
        UnsupportedError: accelerate is missing, or splits weights among devices.
    """
    if steps < 1 or not 0 < rate < math.inf:
        raise ArgumentError("steps, rate", "numbers above 0", (steps, rate))
    accelerator = _accelerator()
    own = [dict(group) for group in groups]
    known = {id(p) for group in own for p in group["params"]}
    rest = [p for p in lesson.parameters() if p.requires_grad and id(p) not in known]
    optimiser = torch.optim.AdamW([*own, {"params": rest}], rate, weight_decay=decay)
    first = [group["lr"] for group in optimiser.param_groups]
    optimiser.zero_grad()
    held, optimiser = accelerator.prepare(lesson, optimiser)
    source = own_batches(batches, accelerator.process_index, accelerator.num_processes)
    for done in range(steps):
        for group, top in zip(optimiser.param_groups, first, strict=True):
            group["lr"] = top * (schedule or factor)(done, steps)
        if isinstance(lesson, Paced):
            lesson.done = done  # forwards do not tell: several may make a step
        many = accelerator.gradient_accumulation_steps
        seen = [_taught(accelerator, held, optimiser, x, rest, clip) for x in islice(source, many)]
        if len(seen) < many:
            raise ArgumentError("batches", f"{steps} steps for each process", done)
        if watch is not None and accelerator.is_main_process:
            means = {n: float(sum(one[n] for one in seen)) / len(seen) for n in seen[0]}
            watch(Progress(done + 1, means))
    accelerator.free_memory()


def _taught(
    accelerator: Any,
    held: nn.Module,
    optimiser: Any,
    batch: Mapping[str, Tensor],
    rest: Sequence[Tensor],
    clip: float,
) -> dict[str, Tensor]:
    """The losses of one batch, from which its step is taken, if it is the last of a step."""
    with accelerator.accumulate(held):
        losses = held(_sent(batch, accelerator.device))
        accelerator.backward(torch.stack(list(losses.values())).sum())
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(rest, clip)
        optimiser.step()
        optimiser.zero_grad()
    return {name: x.detach() for name, x in losses.items()}


def own_batches(batches: Batches, process: int, processes: int) -> Iterator[Mapping[str, Tensor]]:
    """Every so-manieth batch of a stream, from that of this process on. All processes read
    equally far, so that a stream goes on at one place for all of them, and ends for all at once.
    """
    stream = iter(batches)
    while len(together := list(islice(stream, processes))) == processes:
        yield together[process]


def factor(done: int, steps: int) -> float:
    """What the learning rate is multiplied by: up, then down."""
    ramp = max(1, round(steps * WARM_UP))
    return min((done + 1) / ramp, (steps - done) / max(1, steps - ramp))


def _accelerator() -> Any:
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, DistributedType
    except ImportError as error:
        lacks = "accelerate is missing (pip install 'regard[train]')"
        raise UnsupportedError("training", lacks) from error
    # a lesson on attention leaves the last layer's other parts without gradients
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    found = Accelerator(kwargs_handlers=[unused])
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if found.distributed_type in sharded:
        raise UnsupportedError("training", f"{found.distributed_type.value} splits weights")
    return found


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
