"""A folder of results: one file <id>.json for every finished record of one kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from regard.bench.record import Record, read_record, write_json
from regard.core.errors import ArgumentError

R = TypeVar("R", bound=Record)


class Store(Generic[R]):
    """Finished records of a result folder, read once and added to. Each record's `config.id` is its
    name, so its kind has such a field.

    A record is written only when it is finished and in one step, so whatever ends the process costs
    the running one and no other.

    Raises:
        ArgumentError: the folder, or the one that holds it, is no folder or cannot be made, or it
            holds anything but records of this kind; the file is named.
    """

    def __init__(self, folder: Path, kind: type[R]) -> None:
        self.folder, self.kind = folder, kind
        for place in (folder.parent, folder):
            _check_folder(place)
        self.records: dict[str, R] = {_id(record): record for record in self._stored()}

    def _stored(self) -> Iterator[R]:
        for path in sorted(self.folder.iterdir()):
            if path.name.endswith(".json.part"):  # left by a process that ended while writing
                continue
            if path.suffix != ".json" or not path.is_file():
                expected = f"only {self.kind.__name__} records in this folder"
                raise ArgumentError(str(path), expected, "another file")
            record = read_record(path, self.kind)
            if _id(record) != path.stem:
                raise ArgumentError(str(path), f"the name {_id(record)}.json", path.name)
            yield record

    def add(self, record: R) -> None:
        """Keep a finished record."""
        keep(self.folder, record)
        self.records[_id(record)] = record

    def take(self, record: R) -> None:
        """Note a record that a worker has kept, and keep it if that was in another machine's
        folder.
        """
        if (self.folder / f"{_id(record)}.json").exists():
            self.records[_id(record)] = record
        else:
            self.add(record)


def keep(folder: Path, record: Record) -> None:
    """Write a finished record into a folder of such records."""
    write_json(folder / f"{_id(record)}.json", record)


def _id(record: Any) -> str:
    return record.config.id


def _check_folder(place: Path) -> None:
    if place.exists() and not place.is_dir():
        raise ArgumentError("out", "a folder", f"the file {place}")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError("out", f"a folder that can be made ({place})", error.strerror) from (
            error
        )
