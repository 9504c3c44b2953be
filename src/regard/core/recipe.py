"""Recipes: ways to train, distil or quantise a model that need attention's insides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regard.core.card import Claim, Documented, Golden, Paper


@dataclass(frozen=True)
class RecipeCard(Documented):
    """One recipe. build: the function, or the frozen dataclass of its options, that is called."""

    name: str
    build: Callable[..., Any]
    papers: tuple[Paper, ...]
    claim: Claim
    goldens: tuple[Golden, ...] = ()
