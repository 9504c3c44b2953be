"""The book: a folder's results, written whole after every measurement, so that nothing is lost and
the same command goes on where it stopped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch

from regard.bench.efficiency import efficiencies
from regard.bench.machine import hardware, load, versions
from regard.bench.record import Record, read_record, write_json
from regard.bench.rivals import Setting
from regard.bench.roof import measure_roof
from regard.bench.speed import DecodePoint, MemoryPoint, Session, Speed, TargetPoint, TimePoint
from regard.core.errors import ArgumentError
from regard.report.speed import write_speed

FILE = "speed.json"
BUSY = 0.5  # load per core from which times are not to be trusted
Kind = Literal["times", "memory", "decode", "targets"]
Point = TimePoint | MemoryPoint | DecodePoint | TargetPoint


class Book:
    """Results of a folder, read once and added to.

    Raises:
        ArgumentError: `out` is no folder, its results cannot be read, or they are of another
            setting or number of threads.
    """

    def __init__(self, out: Path, setting: Setting, command: str = "") -> None:
        if out.exists() and not out.is_dir():
            raise ArgumentError("out", "a folder", f"the file {out}")
        self.path, self.command = out / FILE, command
        self.speed = Speed(setting=setting, threads=torch.get_num_threads())
        if self.path.exists():
            self.speed = self._read()
        self._session: int | None = None

    def _read(self) -> Speed:
        found, new = read_record(self.path, Speed), self.speed
        if (found.setting, found.threads) != (new.setting, new.threads):
            expected = f"{new.setting} on {new.threads} threads, or another --out"
            got = f"{found.setting} on {found.threads} threads"
            raise ArgumentError(str(self.path), expected, got)
        return found

    @property
    def session(self) -> int:
        """Index of this run; its roof is measured when it is first asked for."""
        if self._session is None:
            self._session = len(self.speed.sessions)
            opened = Session(
                started=datetime.now(UTC).isoformat(timespec="seconds"),
                command=self.command,
                load=load(),
                hardware=hardware(),
                versions=versions(),
                roof=measure_roof(),
            )
            self._change("sessions", (*self.speed.sessions, opened))
        return self._session

    def add(self, kind: Kind, points: Iterable[Point]) -> None:
        """Keep finished points and write the book."""
        self._change(kind, (*getattr(self.speed, kind), *points))

    def published(self, folder: Path) -> tuple[Path, Path]:
        """Copy the results and their report to a folder, named after the day and the machine."""
        last = self.speed.sessions[-1] if self.speed.sessions else None
        if last is None:
            raise ArgumentError("publish", "something measured", "no results")
        processor = re.sub(r"[^a-z0-9]+", "-", last.hardware.processor.lower()).strip("-")
        stem = f"{last.started[:10]}-{processor or 'unknown'}-{self.speed.threads}-threads"
        result, page = folder / f"{stem}.json", folder / f"{stem}.html"
        write_json(result, self.speed)
        write_speed(self.speed.plain(), page)
        return result, page

    def _change(self, field: str, value: tuple[Record, ...]) -> None:
        speed = self.speed.model_copy(update={field: value})
        found = efficiencies(speed.times, speed.memory)
        self.speed = speed.model_copy(update={"efficiency": found, "notes": _notes(speed)})
        write_json(self.path, self.speed)


def _notes(speed: Speed) -> tuple[str, ...]:
    """What differs between the sessions that made these results."""
    notes = []
    for name in speed.sessions[0].versions.plain() if speed.sessions else ():
        values = {str(session.versions.plain()[name]) for session in speed.sessions}
        if len(values) > 1:
            notes.append(f"made with several versions of {name}: {', '.join(sorted(values))}")
    for session in speed.sessions:
        if session.load is not None and session.load > BUSY * session.hardware.cores:
            wanted = f"{session.load:.1f} processes wanted its {session.hardware.cores} cores"
            notes.append(f"the machine was busy at {session.started}: {wanted}")
    processors = {session.hardware.processor for session in speed.sessions}
    if len(processors) > 1:
        notes.append(f"made on several processors: {', '.join(sorted(processors))}")
    return tuple(notes)
