"""Searchers: ways from a measurement to a plan, to a smaller model, or to the samples that matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from regard.core.card import Claim, Golden, Paper, inspect_doc

Finds = Literal["plan", "model", "samples"]


@dataclass(frozen=True)
class SearcherCard:
    """One searcher. build: the function, or the frozen dataclass of its options, that searches.
    finds: what comes of it.
    """

    name: str
    build: Callable[..., Any]
    finds: Finds
    papers: tuple[Paper, ...]
    claim: Claim
    goldens: tuple[Golden, ...] = ()

    @property
    def doc(self) -> str:
        """The searcher file's module docstring."""
        return inspect_doc(self.build)

    @property
    def summary(self) -> str:
        """First sentence of the searcher's file."""
        return " ".join(self.doc.split("\n\n")[0].split())
