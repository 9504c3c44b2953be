r"""Which mechanism in which layer, from one network that holds them all.

    every step:   a_l ~ uniform over candidates,   weights -= lr * grad loss(network with path a)
    afterwards:   argmin_a loss(network with path a, validation)   subject to   cost(a) <= limit

All candidates of a layer share what stands around them (embeddings, norms, convolutions, the other
layers), so a path is judged by weights that it never had alone. Such losses rank paths; how good a
path is, only training it by itself can tell.

The paper searches softmax against cosFormer attention for each block, beside widths and depths, by
RankNAS; its text leaves the value lists open. Here a candidate is any mechanism, and the rest of
the network stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.call import Call
from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.searcher import SearcherCard
from regard.layers.convolved import Convolved
from regard.searchers.architectures import Architectures, Choice
from regard.searchers.exploring import Method, explore
from regard.searchers.series import Told
from regard.tasks.task import Batch, Task

WEIGHT_DECAY = 0.1
Candidate = tuple[str, Mapping[str, Any]]
"""A mechanism and its options."""


class Shell(Protocol):
    """The network around the mechanisms."""

    def build(self, layers: Sequence[Candidate], /) -> nn.Module:
        """A network with these mechanisms, whose `blocks` hold them."""
        ...

    def answers(self, network: nn.Module, batch: Batch, /) -> tuple[Tensor, Tensor]:
        """Scores (A, classes) and targets (A,) of what a batch asks for."""
        ...

    def cost(self, network: nn.Module, /) -> float:
        """What is limited, of a whole network; a sum over its layers and what is around them."""
        ...


class Choosing(nn.Module):
    """Candidates for one place, of which the one numbered `now` is used."""

    def __init__(self, mixers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.mixers, self.now = nn.ModuleList(mixers), 0

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """(B,N,C) -> (B,N,C)."""
        return self.mixers[self.now](x, call)


@dataclass(frozen=True)
class Mixture:
    """What was found: the candidate of every layer by number, its loss with shared weights, its
    cost as a part of the dearest, and the losses of all that were measured.
    """

    choice: Choice
    loss: float
    part: float
    losses: Mapping[Choice, float]


@dataclass(frozen=True)
class Supernet:
    """The search. steps, lr, batch: of training all candidates together. part: what a path may
    cost, as a part of the network whose every layer is the dearest candidate. method, measurements:
    how paths are tried.

    Raises:
        ArgumentError: a value out of range.
    """

    steps: int = 400
    lr: float = 3e-3
    batch: int = 64
    part: float = 1.0
    method: Method = "evolution"
    measurements: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1:
            raise ArgumentError("steps, batch", "at least 1", (self.steps, self.batch))
        if not 0 < self.part <= 1:
            raise ArgumentError("part", "above 0, at most 1", self.part)

    def search(
        self,
        shell: Shell,
        task: Task,
        candidates: Sequence[Candidate],
        layers: int,
        progress: Told | None = None,
    ) -> Mixture:
        """The best path. The caller's random state is left as it was.

        Raises:
            ArgumentError: no candidate; a part that no path meets, with the smallest that can.
        """
        if not candidates:
            raise ArgumentError("candidates", "at least one", 0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            networks = [shell.build([candidate] * layers) for candidate in candidates]
            costs = [shell.cost(network) for network in networks]
            space = self._space(costs, layers)
            network, places = joined(networks)
            self._train(shell, task, network, places, progress)
        examples = list(task.batches("valid", self.batch))
        tried = 0

        def loss(choice: Choice) -> float:
            nonlocal tried
            tried += 1
            _tell(progress, 0.5 + 0.5 * min(tried / self.measurements, 1.0), "measuring paths")
            return path_loss(shell, network, places, choice, examples)

        found = explore(
            space, loss, method=self.method, measurements=self.measurements, seed=self.seed
        )
        _tell(progress, 1.0, "")
        best = found.best
        whole = max(costs) or 1.0
        return Mixture(best, found.losses[best], space.cost(best) / whole, found.losses)

    def _space(self, costs: Sequence[float], layers: int) -> Architectures:
        """The paths, with the costs of every candidate in one layer."""
        row, whole = tuple(cost / layers for cost in costs), max(costs)
        if min(costs) > self.part * whole:
            raise ArgumentError("part", f"at least {min(costs) / whole:.3g}", self.part)
        return Architectures((row,) * layers, self.part * whole * (1 + 1e-9))

    def _train(
        self,
        shell: Shell,
        task: Task,
        network: nn.Module,
        places: Sequence[Choosing],
        progress: Told | None,
    ) -> None:
        """Train a random path in every step."""
        random = np.random.default_rng(self.seed)
        optimiser = torch.optim.AdamW(network.parameters(), self.lr, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
        batches = task.batches("train", self.batch, self.seed)
        for step in range(self.steps):
            _tell(progress, 0.5 * step / self.steps, "training all candidates")
            for place in places:
                place.now = int(random.integers(len(place.mixers)))
            optimiser.zero_grad()
            F.cross_entropy(*shell.answers(network, next(batches))).backward()
            optimiser.step()
            schedule.step()


def joined(networks: Sequence[nn.Module]) -> tuple[nn.Module, list[Choosing]]:
    """The first of some networks of one shape, with the mechanisms of all in its places."""
    holders = [[_holder(block) for block in network.blocks] for network in networks]  # type: ignore[union-attr]
    places = []
    for at in zip(*holders, strict=True):
        places.append(Choosing([holder.mixer for holder in at]))
        at[0].mixer = places[-1]
    return networks[0], places


def _holder(block: Any) -> Any:
    """The module whose `mixer` is the mechanism of a block."""
    return block.mixer if isinstance(block.mixer, Convolved) else block


@torch.no_grad()
def path_loss(
    shell: Shell,
    network: nn.Module,
    places: Sequence[Choosing],
    choice: Choice,
    examples: Sequence[Batch],
) -> float:
    """Mean loss per answer of one path; infinite where it is no number."""
    for place, part in zip(places, choice, strict=True):
        place.now = part
    network.eval()
    total = asked = 0.0
    for batch in examples:
        scores, targets = shell.answers(network, batch)
        total += float(F.cross_entropy(scores.double(), targets, reduction="sum"))
        asked += len(targets)
    network.train()
    return float("inf") if isnan(total) else total / asked


def _tell(progress: Told | None, share: float, what: str) -> None:
    if progress is not None:
        progress(share, what)


CARD = SearcherCard(
    name="supernet",
    build=Supernet,
    finds="model",
    papers=(
        Paper(
            "2207.13955", "Neural Architecture Search on Efficient Transformers and Beyond", 2022
        ),
    ),
    claim=Claim(
        "one layer of softmax attention among cheap ones, where the search puts it, recalls as "
        "softmax in every layer does",
        'regard compare --task recall --mechanisms "softmax,sliding_window(window=2)" --search 0.6',
    ),
)
