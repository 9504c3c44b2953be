"""Hosts: adapters to foreign libraries, found by walking the package `regard.hosts` on demand."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Protocol

from torch import nn

from regard.core.errors import UnsupportedError
from regard.core.incoming import Chosen
from regard.core.moment import Site

PACKAGE = "regard.hosts"


class Run(Protocol):
    """A plan in force."""

    def report(self) -> Mapping[str, Any]:
        """Bytes and tokens of the cache of the last forward: kept, and what a dense one holds."""
        ...


class Host(Protocol):
    """What every host module's `HOST` offers."""

    name: str

    def claims(self, model: object) -> bool:
        """Whether it knows models of this type (without importing the library for it)."""
        ...

    def sites(self, model: Any) -> list[Site]:
        """Every attention module it can reach, in the model's order."""
        ...

    def unreached(self, model: Any) -> Mapping[str, str]:
        """Modules that look like attention and cannot be reached: name -> why."""
        ...

    def in_force(self, model: Any) -> bool:
        """Whether a plan acts on this model now, in this thread."""
        ...

    def run(
        self,
        model: Any,
        steps: Mapping[str, Sequence[Chosen]],
        *,
        masked_only: bool = False,
        storage: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> AbstractContextManager[Run]:
        """A context in which the steps, by site name, act on the model. masked_only: evicted keys
        are hidden instead of dropped. storage: options of quantised storage, by site name.
        """
        ...

    def projection(self, model: Any, site: Site) -> nn.Module:
        """The module that maps a site's concatenated heads (B,N,H*E) to the stream (B,N,C).

        Raises:
            UnsupportedError: none is found.
        """
        ...

    def feed_forward(self, model: Any, site: Site) -> nn.Module:
        """The feed-forward module of a site's block.

        Raises:
            UnsupportedError: none is found.
        """
        ...

    def readout(self, model: Any) -> tuple[nn.Module, nn.Module]:
        """The final norm and the unembedding, which turn the stream into logits (B,N,V).

        Raises:
            UnsupportedError: the model has none.
        """
        ...


def mentions(function: Any, *names: str) -> bool:
    """Whether a function's own code uses one of these global names or attributes."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and any(name in code.co_names for name in names)


def tower_of(name: str) -> str:
    """A module's path with its layer number replaced by `*`: the last number, but the first one
    where sub-layers are numbered too (decoder.block.3.layer.0.SelfAttention).
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return name
    at = numbers[0] if "block" in parts and "layer" in parts else numbers[-1]
    return ".".join([*parts[:at], "*", *parts[at + 1 :]])


@cache
def hosts() -> tuple[Host, ...]:
    """Every host of the installed package, special ones first."""
    package = importlib.import_module(PACKAGE)
    modules = [
        importlib.import_module(f"{PACKAGE}.{info.name}")
        for info in pkgutil.iter_modules(package.__path__)
    ]
    found = [m.HOST for m in modules if hasattr(m, "HOST")]
    return tuple(sorted(found, key=lambda host: host.name != "transformers"))


def host_of(model: object) -> Host:
    """The host that knows this model.

    Raises:
        UnsupportedError: none does.
    """
    for host in hosts():
        if host.claims(model):
            return host
    raise UnsupportedError("plan", f"no host knows models of type {type(model).__name__}")
