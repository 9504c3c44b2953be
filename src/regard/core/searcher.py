"""Searchers: from a measurement to a plan, to a smaller model, or to the samples that matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from regard.core.card import Claim, Documented, Golden, Paper

Finds = Literal["plan", "model", "samples"]


@dataclass(frozen=True)
class SearcherCard(Documented):
    """One searcher. build: the function, or the frozen dataclass of its options, that searches.
    finds: what comes of it.
    """

    name: str
    build: Callable[..., Any]
    finds: Finds
    papers: tuple[Paper, ...]
    claim: Claim
    goldens: tuple[Golden, ...] = ()
