"""The ray launcher: workers of a ray cluster, or of one that is started on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from regard.bench.hub import library
from regard.bench.launching import AGAIN, Job, Waiting, outcome
from regard.core.errors import ArgumentError

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class OnRay:
    """Up to `workers` tasks at a time (None: as many as the cluster holds), each with as many
    processor threads as this process. Results come back through ray and are kept here too, so the
    machines need not share a folder. What a job tells on its way is not passed on.

    Raises:
        UnsupportedError: ray is not installed.
    """

    workers: int | None = None
    again: int = AGAIN

    def __post_init__(self) -> None:
        _imported()

    def map(
        self, job: Job[T, R], records: Sequence[T], told: Callable[[T, Any], None]
    ) -> Iterator[tuple[T, R]]:
        ray, threads = _joined(), torch.get_num_threads()
        run = ray.remote(num_cpus=threads, max_retries=0)(_run)
        waiting, running, shared = Waiting(records, self.again), {}, ray.put(job)
        try:
            while waiting.left or running:
                while waiting.left and len(running) < (self.workers or len(records)):
                    index = waiting.left.popleft()
                    running[run.remote(shared, records[index], threads)] = index
                (ready,), _ = ray.wait(list(running), num_returns=1)
                index = running.pop(ready)
                try:
                    result, error = ray.get(ready)
                except ray.exceptions.RayTaskError:
                    raise
                except ray.exceptions.RayError:  # its process or its machine is gone
                    waiting.killed(index)
                    continue
                if error is not None:
                    raise error
                yield records[index], result
        finally:
            for task in running:
                ray.cancel(task, force=True)
        waiting.check(job)


def _run(job: Job[Any, Any], record: Any, threads: int) -> tuple[Any, Exception | None]:
    torch.set_num_threads(threads)
    return outcome(lambda: job(record, lambda value: None))


def _imported() -> Any:
    return library("ray", "launcher ray")


def _joined() -> Any:
    """Ray, joined to the cluster that RAY_ADDRESS names or to one of this machine.

    Raises:
        ArgumentError: more threads than any machine of the cluster has cores.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unasked
    ray = _imported()
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="warning")
    most = max(node["Resources"].get("CPU", 0) for node in ray.nodes())
    if torch.get_num_threads() > most:
        raise ArgumentError(
            "threads", f"at most {most:g}, as a machine has", torch.get_num_threads()
        )
    return ray
