"""Launchers: where the trials of a sweep run. Whatever the launcher, the same records come out.

A sweep is a job and plain records; a launcher does the job for every record and hands results back
in any order. A worker that is killed costs the record it was at, which is tried again; one lost
that often that no try is left is reported when all others are finished.
"""

from __future__ import annotations

import pickle
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from regard.core.errors import RegardError

T = TypeVar("T")
T_in = TypeVar("T_in", contravariant=True)
R_out = TypeVar("R_out", covariant=True)
R = TypeVar("R")
Tell = Callable[[Any], None]

AGAIN = 1
"""Times that a record whose worker was killed is tried again."""


class Job(Protocol[T_in, R_out]):
    """What is done with one record. It can be pickled, keeps what it has finished, and gives it."""

    def name(self, record: T_in, /) -> str:
        """What the record is called in errors."""
        ...

    def __call__(self, record: T_in, tell: Tell, /) -> R_out:
        """Do it. tell: takes, now and then, how far it is."""
        ...


class Launcher(Protocol):
    """Runs jobs."""

    def map(
        self, job: Job[T, R], records: Sequence[T], told: Callable[[T, Any], None]
    ) -> Iterator[tuple[T, R]]:
        """Every record with its result, in any order. told: gets what the job tells, where the
        launcher can pass it on. Closing the iterator, or an error, ends what is still running.

        Raises:
            LostError: after all other records, if workers were killed at one too often.
            Exception: what the job raised, at once.
        """
        ...


class LostError(RegardError):
    """Records whose workers were killed, again when tried again; all others are finished."""

    def __init__(self, names: Sequence[str], tries: int) -> None:
        super().__init__(
            f"the worker was killed in each of {tries} tries (out of memory?): {'; '.join(names)}"
        )
        self.names = tuple(names)


class Here:
    """In this process, one record after the other."""

    def map(
        self, job: Job[T, R], records: Sequence[T], told: Callable[[T, Any], None]
    ) -> Iterator[tuple[T, R]]:
        for record in records:
            yield record, job(record, lambda value, record=record: told(record, value))


class Waiting(Generic[T]):
    """Records to be done, by index, with the tries that each has left."""

    def __init__(self, records: Sequence[T], again: int) -> None:
        self.records, self.again = records, again
        self.left = deque(range(len(records)))
        self.tries = [1 + again] * len(records)

    def killed(self, index: int) -> None:
        """The worker at this record was killed."""
        self.tries[index] -= 1
        if self.tries[index]:
            self.left.append(index)

    def check(self, job: Job[T, Any]) -> None:
        """Raise LostError if a record has no try left."""
        lost = [job.name(r) for r, tries in zip(self.records, self.tries, strict=True) if not tries]
        if lost:
            raise LostError(lost, 1 + self.again)


def outcome(doing: Callable[[], R]) -> tuple[R | None, Exception | None]:
    """What a worker answers: the result, or what was raised in a form that can be sent."""
    try:
        return doing(), None
    except Exception as error:
        if not isinstance(error, RegardError):
            error.add_note(f"in a worker:\n{traceback.format_exc()}")
        return None, _sent(error)


def _sent(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception as problem:  # whatever an error of a foreign library trips over
        said = RuntimeError(f"{type(error).__name__}: {error}")
        said.add_note(f"the error itself cannot be sent: {type(problem).__name__}")
        return said
    return error
