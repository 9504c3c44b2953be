"""Leaving sub-layers out: their modules answer zeros while a plan is in force in this thread, so
that the residual passes and nothing is computed or cached.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.errors import UnsupportedError
from regard.hosts.transformers.run import RUNS, Run

MLP = re.compile(r"^(mlp|feed_forward|ffn|block_sparse_moe)$")
_LOCK = threading.Lock()
_COUNTS: dict[int, int] = {}


@contextmanager
def bypassed(run: Run) -> Iterator[None]:
    """A context in which the sub-layers that the run's steps remove are left out."""
    modules = dict(run.model.named_modules())
    removed = {}
    for name in modules:
        site, steps = run.sites.get(id(modules[name]), (None, []))
        if site is None:
            continue
        for sublayer in {part for s in steps for part in s.treatment.removes}:
            target = name if sublayer == "attention" else _mlp_beside(name, modules)
            removed[id(modules[target])] = (modules[target], sublayer)
    run.removed = set(removed)
    for module, sublayer in removed.values():
        _install(module, sublayer == "attention")
    try:
        yield
    finally:
        for module, _ in removed.values():
            _remove(module)


def _mlp_beside(name: str, modules: dict[str, nn.Module]) -> str:
    """The feed-forward module of the block in which an attention module stands."""
    parent = name.rpartition(".")[0]
    for child, _ in modules[parent].named_children():
        if MLP.match(child):
            return f"{parent}.{child}"
    raise UnsupportedError("plan", f"{parent} has no feed-forward module beside its attention")


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
