"""One query of one head, as it is shown: the keys that matter, with their words and weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Span:
    """Successive keys from number `start` on: their words and weights."""

    start: int
    words: tuple[str, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Example:
    """One query of one head: where it stands, its word, and the spans of keys that matter, or, in
    an image, all keys after the prefix, grid (h,w).
    """

    tower: str
    layer: int
    head: int
    passage: int
    query: int
    word: str
    spans: tuple[Span, ...]
    grid: tuple[int, int] | None = None


def example_from(record: Mapping[str, Any]) -> Example:
    """An example from its JSON record."""
    spans = tuple(Span(s["start"], tuple(s["words"]), tuple(s["weights"])) for s in record["spans"])
    grid = None if record["grid"] is None else (record["grid"][0], record["grid"][1])
    return Example(**{**record, "spans": spans, "grid": grid})
