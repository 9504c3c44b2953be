"""`compare`: train mechanisms side by side on one task, and resume where it was left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from regard.bench.comparison import Comparison, compared
from regard.bench.launching import Here, Launcher, Tell
from regard.bench.network import answers, build_network
from regard.bench.record import read_record, write_json
from regard.bench.spec import Spec
from regard.bench.store import Store, keep
from regard.bench.study import Study
from regard.bench.training import Moment, run_trial
from regard.bench.trial import Trial, TrialConfig
from regard.core.errors import ArgumentError, RegardError
from regard.tasks.catalog import task as task_named
from regard.tasks.task import Task


@dataclass(frozen=True)
class Progress:
    """Where a comparison stands: finished trials, the fractions of running ones included, of how
    many; the trial that was last heard of and its last validation accuracy.
    """

    done: float
    total: int
    trial: TrialConfig | None = None
    accuracy: float | None = None


Watch = Callable[[Progress], None]


def unwatched(progress: Progress) -> None:
    """The watch of a caller who does not look."""


def compare(
    study: Study,
    out: Path,
    *,
    command: str = "",
    watch: Watch = unwatched,
    launcher: Launcher | None = None,
) -> Comparison:
    """Run the trials of a study that `out` does not hold yet, and compare them all.

    Everything is checked before the first trial starts: names and options, that every mechanism
    serves the task, and what the folder holds. Trials are kept in OUT/trials as they finish, the
    result in OUT/comparison.json. `watch` is told after every training step; what it raises ends
    the comparison, and the next call goes on from the finished trials. launcher: where trials run,
    in this process if None; the same files come out of all.

    Raises:
        ArgumentError: a value, option or result folder that cannot be used; it is named.
        UnknownNameError: no such task, mechanism or option; near names are suggested.
        UnsupportedError: a mechanism that cannot serve the task.
        LostError: trials whose workers were killed; all others are finished.
    """
    task = task_named(study.task.name, **study.task.options)
    for spec in study.mechanisms:
        check_mechanism(spec, study, task)
    store = Store(out / "trials", Trial)
    result = out / "comparison.json"
    if result.exists():
        read_record(result, Comparison)
    missing = [config for config in study.trials if config.id not in store.records]
    board = _Board(len(study.trials) - len(missing), len(study.trials), watch)
    board.show()
    trialling = Trialling((out / "trials").absolute())
    for config, trial in (launcher or Here()).map(trialling, missing, board.told):
        store.take(trial)
        board.finished(config)
    board.show()
    trials = [store.records[config.id] for config in study.trials]
    comparison = compared(study, task, trials, command)
    write_json(result, comparison)
    return comparison


@dataclass(frozen=True)
class Trialling:
    """The job of a comparison: train one mechanism, and keep the finished trial in a folder."""

    folder: Path

    def name(self, config: TrialConfig) -> str:
        return config.label

    def __call__(self, config: TrialConfig, tell: Tell) -> Trial:
        trial = run_trial(config, task_named(config.task.name, **config.task.options), tell)
        keep(self.folder, trial)
        return trial


class _Board:
    """Tells a watch how far the trials are."""

    def __init__(self, done: int, total: int, watch: Watch) -> None:
        self.done, self.total, self.watch = done, total, watch
        self.running: dict[str, float] = {}

    def told(self, config: TrialConfig, moment: Moment) -> None:
        """A running trial says where it stands."""
        self.running[config.id] = min(moment.fraction, 1.0)
        self.show(config, moment.accuracy)

    def finished(self, config: TrialConfig) -> None:
        """A trial is kept."""
        self.running.pop(config.id, None)
        self.done += 1

    def show(self, config: TrialConfig | None = None, accuracy: float | None = None) -> None:
        """Tell the watch."""
        done = self.done + sum(self.running.values())
        self.watch(Progress(done, self.total, config, accuracy))


def check_mechanism(spec: Spec, study: Study, task: Task) -> None:
    """Build the mechanism's network and run it on two examples of the task.

    Raises:
        RegardError: it cannot be built or cannot serve the task; the mechanism is named.
    """
    examples = next(task.batches("valid", 2))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            answers(build_network(spec, study.network, task), examples)
    except RegardError as error:
        error.add_note(f"in {spec.label}")
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0] if str(error) else ""
        problem = f"{type(error).__name__}: {first}"
        raise ArgumentError(f"mechanisms: {spec.label}", "options it can run with", problem) from (
            error
        )
