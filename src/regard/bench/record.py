"""Result records: plain data that is frozen, refuses unknown fields, and is written whole or not at
all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from regard.core.errors import ArgumentError, RegardError


class Record(BaseModel):
    """Base of every record: frozen, finite numbers only, an unknown field is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True
    )

    def plain(self) -> dict[str, Any]:
        """The record as JSON-ready dictionaries, lists and numbers."""
        return self.model_dump(mode="json", by_alias=True)


R = TypeVar("R", bound=Record)


def digest(value: Record) -> str:
    """A stable name: the same record has the same one on every machine."""
    text = json.dumps(value.plain(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def arguments_checked() -> Iterator[None]:
    """Inside, a record that refuses a value raises an ArgumentError that names the field."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, RegardError):
            raise cause from error
        field = ".".join(str(part) for part in first["loc"]) or "value"
        expected = first["msg"].removeprefix("Input should be ")
        raise ArgumentError(field, expected, repr(first["input"])) from error


def read_record(path: Path, kind: type[R]) -> R:
    """The record of that kind in a JSON file.

    Raises:
        ArgumentError: the file cannot be read, or holds something else; it is named.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ArgumentError(str(path), "a readable file", error.strerror) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        problem = f"{where}: {first['msg']}" if where else first["msg"]
        raise ArgumentError(str(path), f"a {kind.__name__} record", problem) from error


def write_json(path: Path, value: Record) -> None:
    """Write a record to a JSON file in one step: a reader sees the old file or the whole new one.

    Raises:
        ArgumentError: the file cannot be written; it is named.
    """
    text = json.dumps(value.plain(), indent=1, allow_nan=False)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ArgumentError(str(path), "a place to write to", error.strerror) from error
