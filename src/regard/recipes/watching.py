"""Watching a finished model: a treatment of all its self-attention that changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from regard.core.hosting import host_of
from regard.core.incoming import Chosen
from regard.core.treatment import Treatment


@contextmanager
def watched(model: Any, watch: Treatment) -> Iterator[None]:
    """A context in which `watch` acts on all self-attention, in forwards without a filled cache."""
    host = host_of(model)
    steps = {
        site.name: [Chosen(0, watch, tuple(range(site.heads)), frozenset({"prefill"}))]
        for site in host.sites(model)
        if not site.cross
    }
    with host.run(model, steps):
        yield
