"""Training of one trial: AdamW with weight decay 0.1 and a cosine schedule, as the recall paper
trains (Zoology, 2312.04927), ended early once validation accuracy is enough.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

import torch
import torch.nn.functional as F

from regard.backbones.language import Language
from regard.backbones.vision import Vision
from regard.bench.machine import hardware, versions
from regard.bench.network import Notes, answers, build_network, decode_bytes
from regard.bench.trial import ENOUGH, Budget, Point, Status, Trial, TrialConfig
from regard.core.count import count_flops
from regard.tasks.task import Batch, Split, Task

WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Moment:
    """Where a trial stands: the fraction of its budget used, and the last validation accuracy."""

    fraction: float
    accuracy: float | None


Watch = Callable[[Moment], None]


def run_trial(config: TrialConfig, task: Task, watch: Watch) -> Trial:
    """Train and judge one mechanism on the task that the config names.

    With a budget in steps, the same config gives the same numbers on one machine with one number of
    threads. The caller's random state is left as it was.
    """
    started = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build_network(config.mechanism, config.network, task)
        run = Training(config, task, network)
        run.train(watch)
        return Trial(
            config=config,
            versions=versions(),
            hardware=hardware(),
            seed=config.seed,
            parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
            flops_per_step=run.flops_per_step,
            flops_total=run.flops_per_step * run.steps,
            state_bytes=decode_bytes(network, task),
            curve=tuple(run.curve),
            valid_accuracy=run.curve[-1].accuracy,
            test_accuracy=run.accuracy("test"),
            seconds=time.monotonic() - started,
            status=run.status,
        )


@dataclass
class Training:
    """One run of training: what it works on, and what it has found so far."""

    config: TrialConfig
    task: Task
    network: Language | Vision
    steps: int = 0
    flops_per_step: int = 0
    status: Status = "spent"
    curve: list[Point] = field(default_factory=list)
    drawn: dict[Split, list[Batch]] = field(default_factory=dict)  # examples to be judged on

    def train(self, watch: Watch) -> None:
        """Train the network in place until it is solved, has diverged or the budget is used up."""
        config, budget, used = self.config, self.config.budget, Used(self.config.budget)
        optimiser = torch.optim.AdamW(
            self.network.parameters(), config.lr, weight_decay=WEIGHT_DECAY
        )
        losses: list[float] = []
        for batch in self.task.batches("train", budget.batch, config.seed):
            optimiser.param_groups[0]["lr"] = config.lr * cosine(used.fraction(self.steps))
            optimiser.zero_grad()
            losses.append(self._gradients(batch))
            self.steps += 1
            optimiser.step()
            fraction = used.fraction(self.steps)
            broken = not math.isfinite(losses[-1])
            if broken or fraction >= 1 or self.steps % budget.every == 0:
                self._measure(None if broken else fmean(losses))
                losses = []
            watch(Moment(fraction, self.curve[-1].accuracy if self.curve else None))
            if fraction >= 1 or self.status != "spent":
                return

    def accuracy(self, split: Split) -> float:
        """Fraction of right answers; one whose scores are not all finite is wrong."""
        if split not in self.drawn:
            self.drawn[split] = list(self.task.batches(split, self.config.budget.batch))
        right = asked = 0
        self.network.eval()
        with torch.no_grad():
            for batch in self.drawn[split]:
                scores, targets = answers(self.network, batch)
                hits = (scores.argmax(-1) == targets) & scores.isfinite().all(-1)
                right, asked = right + int(hits.sum()), asked + len(targets)
        self.network.train()
        return right / asked

    def _gradients(self, batch: Batch) -> float:
        """Loss of a batch, its gradients left in the network; the first one is counted."""
        if self.steps == 0:
            with count_flops() as counted:
                loss = _backward(self.network, batch)
            self.flops_per_step = counted.flops
            return loss
        return _backward(self.network, batch)

    def _measure(self, loss: float | None) -> None:
        found = self.accuracy("valid")
        self.curve.append(Point(step=self.steps, loss=loss, accuracy=found))
        if loss is None:
            self.status = "diverged"
        elif found >= ENOUGH:
            self.status = "solved"


class Used:
    """How much of a budget is used: by steps taken, or by the clock since this object was made."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self.started = budget, time.monotonic()

    def fraction(self, steps: int) -> float:
        """The used fraction after some steps; 1 or more means: stop."""
        if self.budget.steps is not None:
            return steps / self.budget.steps
        return (time.monotonic() - self.started) / (60 * (self.budget.minutes or 1))


def cosine(fraction: float) -> float:
    """Factor on the learning rate: 1 at the start, 0 when the budget is used up."""
    return 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))


def _backward(network: Language | Vision, batch: Batch) -> float:
    """The loss of a batch: cross-entropy, plus what the mechanisms noted as a `..._loss`."""
    notes: Notes = {}
    loss = F.cross_entropy(*answers(network, batch, notes))
    total = loss + sum(sum(values) for name, values in notes.items() if name.endswith("_loss"))
    total.backward()
    return loss.item()
