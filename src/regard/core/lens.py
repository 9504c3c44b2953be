"""Lens cards: instruments with parameters of their own, for a look inside a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regard.core.card import Claim, Golden, Paper, inspect_doc


@dataclass(frozen=True)
class LensCard:
    """One instrument: what builds it, where it comes from, and its goldens."""

    name: str
    build: Callable[..., Any]
    papers: tuple[Paper, ...]
    claim: Claim
    goldens: tuple[Golden, ...] = ()

    @property
    def doc(self) -> str:
        """The lens file's module docstring."""
        return inspect_doc(self.build)

    @property
    def summary(self) -> str:
        """First sentence of the lens file."""
        return " ".join(self.doc.split("\n\n")[0].split())
