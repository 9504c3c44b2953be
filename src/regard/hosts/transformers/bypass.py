"""Leaving sub-layers out: their modules answer zeros while a plan is in force in this thread, so
that the residual passes and nothing is computed or cached.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from regard.hosts.parts import Parts
from regard.hosts.transformers.run import RUNS, Run

_LOCK = threading.Lock()
_COUNTS: dict[int, int] = {}


@contextmanager
def bypassed(run: Run) -> Iterator[None]:
    """A context in which the sub-layers that the run's steps remove are left out."""
    modules = dict(run.model.named_modules())
    parts, removed = Parts(), {}
    for name in modules:
        site, steps = run.sites.get(id(modules[name]), (None, []))
        if site is None:
            continue
        for sublayer in {part for s in steps for part in s.treatment.removes}:
            target = (
                modules[name] if sublayer == "attention" else parts.feed_forward(run.model, site)
            )
            removed[id(target)] = (target, sublayer)
    run.removed = set(removed)
    for module, sublayer in removed.values():
        _install(module, sublayer == "attention")
    try:
        yield
    finally:
        for module, _ in removed.values():
            _remove(module)


def _install(module: Any, attention: bool) -> None:
    with _LOCK:
        _COUNTS[id(module)] = _COUNTS.get(id(module), 0) + 1
        if _COUNTS[id(module)] == 1:
            module.forward = _answering(module, module.forward, attention)


def _remove(module: Any) -> None:
    with _LOCK:
        _COUNTS[id(module)] -= 1
        if not _COUNTS[id(module)]:
            del _COUNTS[id(module)]
            del module.forward


def _answering(module: Any, forward: Any, attention: bool) -> Any:
    """A forward that gives zeros under a plan that removes the module, else what it always did."""

    def answer(*args: Any, **kwargs: Any) -> Any:
        innermost = next((r for r in reversed(RUNS.get()) if r.knows(module)), None)
        if innermost is None or id(module) not in innermost.removed:
            return forward(*args, **kwargs)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        zeros = torch.zeros_like(hidden)
        return (zeros, None) if attention else zeros

    return answer
