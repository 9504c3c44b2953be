"""Lens cards: instruments with parameters of their own, for a look inside a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regard.core.card import Claim, Documented, Golden, Paper


@dataclass(frozen=True)
class LensCard(Documented):
    """One instrument: what builds it, where it comes from, and its goldens."""

    name: str
    build: Callable[..., Any]
    papers: tuple[Paper, ...]
    claim: Claim
    goldens: tuple[Golden, ...] = ()
