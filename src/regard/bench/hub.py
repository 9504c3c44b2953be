"""Reading models of foreign libraries: only what is asked for is fetched, no code that comes with a
model is run, and what goes wrong is told in one line.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regard.core.errors import ArgumentError, UnsupportedError


def library(
    name: str = "transformers", who: str = "evaluation of models", extra: str | None = None
) -> Any:
    """A library that comes with an extra of this one, of its own name unless another is said.

    Raises:
        UnsupportedError: it is missing.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        lacks = f"{name} is missing (pip install 'regard[{extra or name}]')"
        raise UnsupportedError(who, lacks) from error


def fetching(name: str) -> dict[str, Any]:
    """Options of every call that loads: from a folder nothing is fetched."""
    return {"local_files_only": Path(name).is_dir(), "trust_remote_code": False}


def told(name: str) -> str:
    """A folder is told by its last part, so that results name no one's machine."""
    return Path(name).resolve().name if Path(name).is_dir() else name


@contextmanager
def quiet(library: Any, wanted: bool = True) -> Iterator[None]:
    """Inside, the library draws no progress bars, if that is wanted: what is at hand is read in a
    moment, what is fetched is not.
    """
    bars = library.utils.logging
    if not (wanted and bars.is_progress_bar_enabled()):
        yield
        return
    bars.disable_progress_bar()
    try:
        yield
    finally:
        bars.enable_progress_bar()


class loading:
    """Inside, what a foreign library raises about a model becomes an ArgumentError."""

    def __init__(self, name: str) -> None:
        self.name = name
        if name.startswith((".", "/", "~")) and not Path(name).is_dir():
            raise ArgumentError("MODEL", "an existing folder", name)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        foreign = (OSError, ValueError, KeyError, RuntimeError, ImportError)
        if isinstance(error, foreign) and not isinstance(error, ArgumentError | UnsupportedError):
            first = next((line for line in str(error).splitlines() if line), type(error).__name__)
            expected = "'pocket', a model's folder or its name on the hub"
            raise ArgumentError("MODEL", expected, f"{self.name} ({first})") from error


def config_of(folder: Path, file: str = "config.json") -> dict[str, Any]:
    """A configuration file of a model's folder; empty where there is none.

    Raises:
        ArgumentError: it is no JSON object.
    """
    path = folder / file
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArgumentError("MODEL", f"{file} in JSON", f"{path} ({error})") from error
    if not isinstance(found, dict):
        raise ArgumentError("MODEL", f"{file} with named entries", path)
    return found
