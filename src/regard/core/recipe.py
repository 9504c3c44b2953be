"""Recipes: ways to train, distil or quantise a model that need attention's insides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regard.core.card import Claim, Golden, Paper, inspect_doc


@dataclass(frozen=True)
class RecipeCard:
    """One recipe. build: the function that is called, or the frozen dataclass of its options."""

    name: str
    build: Callable[..., Any]
    papers: tuple[Paper, ...]
    claim: Claim
    goldens: tuple[Golden, ...] = ()

    @property
    def doc(self) -> str:
        """The recipe file's module docstring."""
        return inspect_doc(self.build)

    @property
    def summary(self) -> str:
        """First sentence of the recipe's file."""
        return " ".join(self.doc.split("\n\n")[0].split())
