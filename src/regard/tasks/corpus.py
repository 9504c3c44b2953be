"""Text that every Python carries: its documentation topics and its standard library's source.

Nothing is fetched or shipped: the text is read from the running interpreter, so its wording changes
a little from one Python version to the next. A user's file can stand in for it.
"""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regard.core.errors import ArgumentError, UnsupportedError
from regard.tasks.task import Split

HOLD = 10  # of so many documents, one is for validation and one for the test
TENTHS: dict[Split, range] = {"train": range(HOLD - 2), "valid": range(8, 9), "test": range(9, 10)}
Bytes = NDArray[np.uint8]


def documents() -> list[bytes]:
    """Documentation topics by name, then the modules of the standard library by file name.

    Raises:
        UnsupportedError: this Python came without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UnsupportedError("the text tasks", "this Python lacks its documentation") from error
    library = Path(sysconfig.get_path("stdlib"))
    modules = [path.read_bytes() for path in sorted(library.glob("*.py"))]
    return [topics[name].encode() for name in sorted(topics)] + modules


@cache
def corpus(split: Split, file: str | None = None) -> Bytes:
    """All text of one split, as bytes: whole documents, or the matching tenths of a user's file
    (its first eight for training, then one each). Splits share no document.

    Raises:
        ArgumentError: a file that cannot be read.
        UnsupportedError: no file is named and this Python came without its documentation.
    """
    tenths = TENTHS[split]
    if file is None:
        chosen = [text for index, text in enumerate(documents()) if index % HOLD in tenths]
        return np.frombuffer(b"\n\n".join(chosen), dtype=np.uint8)
    try:
        text = Path(file).read_bytes()
    except OSError as error:
        raise ArgumentError("file", f"a readable text file ({error.strerror})", file) from error
    part = text[len(text) * tenths.start // HOLD : len(text) * tenths.stop // HOLD]
    return np.frombuffer(part, dtype=np.uint8)


def passages(starts: NDArray[np.float64], length: int, split: Split, file: str | None) -> Bytes:
    """Passages of `length` bytes of a split, (len(starts), length). A start is a number in [0, 1]:
    0 is the first place where a passage fits, 1 the last one.

    Raises:
        ArgumentError: the split holds less text than one passage.
    """
    text = corpus(split, file)
    if len(text) < length:
        raise ArgumentError("file", f"at least {HOLD * length} bytes of text", file)
    first = (starts * (len(text) - length)).astype(np.int64)
    return text[first[:, None] + np.arange(length)]


def excerpts(
    random: np.random.Generator, count: int, length: int, split: Split, file: str | None = None
) -> NDArray[np.int64]:
    """`count` passages of `length` bytes from random places, as ids (count, length); errors as
    `passages`.
    """
    return passages(random.random(count), length, split, file).astype(np.int64)
