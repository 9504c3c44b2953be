"""The local launcher: processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Self, TypeVar

import torch

from regard.bench.launching import AGAIN, Job, Waiting, outcome

T = TypeVar("T")
R = TypeVar("R")


class Local:
    """Up to `workers` processes, each doing one record at a time with as many processor threads as
    this process has. They are started afresh, share nothing, ignore Ctrl-C, stay for the next job,
    and end with this process, however that ends, or with `close`. again: tries after a worker was
    killed.
    """

    def __init__(self, workers: int, again: int = AGAIN) -> None:
        self.workers, self.again = workers, again
        self._idle: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        while self._idle:
            self._idle.pop().end()

    def map(
        self, job: Job[T, R], records: Sequence[T], told: Callable[[T, Any], None]
    ) -> Iterator[tuple[T, R]]:
        waiting, packed = Waiting(records, self.again), pickle.dumps(job)
        busy: dict[Connection, tuple[_Worker, int]] = {}
        try:
            while waiting.left or busy:
                while waiting.left and len(busy) < self.workers:
                    worker = self._idle.pop() if self._idle else _Worker()
                    index = waiting.left.popleft()
                    worker.give(packed, records[index])
                    busy[worker.line] = worker, index
                for line in wait(list(busy)):
                    worker, index = busy[line]  # type: ignore[index]
                    on_the_way, answer = worker.said()
                    if on_the_way:
                        told(records[index], answer)
                        continue
                    del busy[worker.line]
                    if answer is None:
                        worker.end()
                        waiting.killed(index)
                        continue
                    self._idle.append(worker)
                    result, error = answer
                    if error is not None:
                        raise error
                    yield records[index], result
        finally:
            for worker, _ in busy.values():
                worker.end()
        waiting.check(job)


class _Worker:
    """One process, and the line to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.line, its = context.Pipe()
        self.process = context.Process(target=_serve, args=(its,), daemon=True)
        self.process.start()
        its.close()  # so that the line breaks when the process ends
        self.job = b""

    def give(self, job: bytes, record: Any) -> None:
        news = None if job == self.job else (job, torch.get_num_threads())
        with suppress(BrokenPipeError):  # it was killed: so says the next look at the line
            self.line.send((news, record))
        self.job = job

    def said(self) -> tuple[bool, Any]:
        """Whether it tells how far it is, and what; else its answer, None if it has ended."""
        try:
            return self.line.recv()
        except (EOFError, ConnectionResetError):
            return False, None

    def end(self) -> None:
        self.process.kill()  # what it has finished is kept, and files are written whole
        self.process.join()
        self.line.close()


def _serve(line: Connection) -> None:
    """The life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow, daemon=True).start()
    job: Any = None

    def doing() -> Any:
        nonlocal job
        if news is not None:
            packed, threads = news
            torch.set_num_threads(threads)
            job = pickle.loads(packed)
        return job(record, lambda value: line.send((True, value)))

    with suppress(EOFError, OSError):  # the line breaks when the launcher is gone
        while True:
            news, record = line.recv()
            line.send((False, outcome(doing)))


def _follow() -> None:
    """End this process when the one that started it has ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
