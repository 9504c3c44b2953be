"""A mixture of mechanisms, one per layer, found on a comparison's task and compared beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from regard.bench.network import answers, build_layers, decode_bytes
from regard.bench.record import Record, digest
from regard.bench.spec import HYBRID, Spec
from regard.bench.store import Store
from regard.bench.study import Study
from regard.bench.trial import STEPS, Network
from regard.core.count import count_flops
from regard.core.errors import ArgumentError
from regard.searchers.series import Told
from regard.searchers.supernet import Candidate, Supernet
from regard.tasks.catalog import task as task_named
from regard.tasks.task import Batch, Task


class MixtureConfig(Record):
    """Everything that decides a mixture on one machine. part: of the dearest candidate's cost."""

    task: Spec
    candidates: tuple[Spec, ...]
    network: Network
    part: Annotated[float, Field(gt=0, le=1)]
    steps: PositiveInt
    batch: PositiveInt
    lr: float
    seed: int

    @property
    def id(self) -> str:
        """Its name."""
        return digest(self)


class MixtureRecord(Record):
    """A mixture: the mechanism of every layer. part: its cost, as a part of the dearest's. losses:
    of every path that was measured with shared weights, None where it was no number.
    """

    format: Literal["regard.mixture/1"] = Field(default="regard.mixture/1", alias="schema")
    config: MixtureConfig
    layers: tuple[Spec, ...]
    part: float
    losses: dict[str, float | None]

    @property
    def spec(self) -> Spec:
        """The mixture as one mechanism of a study."""
        first = self.layers[0]
        if all(layer == first for layer in self.layers):
            return first
        return Spec(name=HYBRID, options={"layers": tuple(layer.label for layer in self.layers)})


@dataclass(frozen=True)
class TaskShell:
    """The network of a trial, for a search. Cost: bytes of decode state where every candidate
    decodes, else operations of a forward.
    """

    network: Network
    task: Task
    decodes: bool

    def build(self, layers: Sequence[Candidate]) -> nn.Module:
        return build_layers(layers, self.network, self.task)

    def answers(self, network: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return answers(network, batch)

    def cost(self, network: Any) -> float:
        if self.decodes:
            return float(decode_bytes(network, self.task) or 0)
        with count_flops() as counted:
            answers(network, next(self.task.batches("valid", 1)))
        return float(counted.flops)


def with_mixture(study: Study, part: float, out: Path, progress: Told | None = None) -> Study:
    """The study with a mixture of its mechanisms beside them, unless it is one of them: found with
    the first learning rate and seed, in as many steps as a trial has, at no more than a part of the
    dearest one's decode state (of its operations, where a mechanism does not decode). Kept in
    OUT/mixtures.

    Raises:
        ArgumentError: a part that no mixture meets; a single mechanism.
        RegardError: a mechanism that cannot serve the task.
    """
    if len(study.mechanisms) < 2:
        raise ArgumentError("search", "two mechanisms or more to mix", len(study.mechanisms))
    config = MixtureConfig(
        task=study.task, candidates=study.mechanisms, network=study.network, part=part,
        steps=study.budget.steps or STEPS, batch=study.budget.batch, lr=study.lrs[0],
        seed=study.seeds[0],
    )  # fmt: skip
    store = Store(out / "mixtures", MixtureRecord)
    if config.id not in store.records:
        store.add(_found(config, progress))
    mixed = store.records[config.id].spec
    if mixed in study.mechanisms:
        return study
    return study.model_copy(update={"mechanisms": (*study.mechanisms, mixed)})


def _found(config: MixtureConfig, progress: Told | None) -> MixtureRecord:
    task = task_named(config.task.name, **config.task.options)
    given = [(spec.name, spec.options) for spec in config.candidates]
    layers = config.network.layers
    decodes = all(
        decode_bytes(build_layers([one] * layers, config.network, task), task) is not None
        for one in given
    )
    search = Supernet(
        steps=config.steps, lr=config.lr, batch=config.batch, part=config.part, seed=config.seed
    )
    found = search.search(TaskShell(config.network, task, decodes), task, given, layers, progress)
    named = [spec.label for spec in config.candidates]
    return MixtureRecord(
        config=config,
        layers=tuple(config.candidates[part] for part in found.choice),
        part=found.part,
        losses={
            " | ".join(named[part] for part in choice): None if loss == float("inf") else loss
            for choice, loss in found.losses.items()
        },
    )
