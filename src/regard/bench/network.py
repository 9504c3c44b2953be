"""The network of a trial: the backbone that its task asks for, its mechanism in every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from regard.backbones.language import Language
from regard.backbones.vision import Vision
from regard.bench.spec import Spec
from regard.bench.trial import CONV, Network
from regard.core.errors import ArgumentError
from regard.tasks.task import IGNORED, Batch, Task

Notes = dict[str, list[Any]]


def build_network(mechanism: Spec, shell: Network, task: Task) -> Language | Vision:
    """A network from the task's inputs to scores of its answers.

    Raises:
        UnknownNameError: no such mechanism or option.
        UnsupportedError: a mechanism that cannot serve the task.
        ArgumentError: a convolution asked for on a grid.
    """
    layers = [(part.name, part.options) for part in mechanism.over(shell.layers)]
    return build_layers(layers, shell, task)


def build_layers(
    layers: Sequence[tuple[str, Mapping[str, Any]]], shell: Network, task: Task
) -> Language | Vision:
    """The same with a mechanism and its options for each layer."""
    if task.kind == "tokens":
        conv = CONV if shell.conv is None else shell.conv
        return Language(task.vocab, shell.dim, layers, heads=shell.heads, conv=conv)
    if task.grid is None:
        raise ArgumentError("task.grid", "side lengths for a task on grids", None)
    if shell.conv is not None:
        raise ArgumentError("conv", f"nothing for the grids of {task.name}", shell.conv)
    return Vision(task.grid, task.channels, task.classes, shell.dim, layers, heads=shell.heads)


def answers(
    network: Language | Vision, batch: Batch, notes: Notes | None = None
) -> tuple[Tensor, Tensor]:
    """Scores (A, classes) and targets (A,) of the A answers that a batch asks for; only they are
    computed. notes: collects what the mechanisms leave.
    """
    if not isinstance(network, Language):
        return network(batch.inputs, notes), batch.targets
    asked = batch.targets != IGNORED
    encoded = network.encode(batch.inputs, notes=notes)
    return network.logits(encoded[asked]), batch.targets[asked]


def decode_bytes(network: Language | Vision, task: Task) -> int | None:
    """Bytes that decoding holds per sequence after the task's length; None without decoding."""
    return network.state_bytes(task.length) if isinstance(network, Language) else None
