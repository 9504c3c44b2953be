"""What passes through modules of a model while it runs, and what a linear one does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.errors import UnsupportedError
from regard.core.moment import Site

STREAM = "hidden_states"
"""The keyword under which a block may be given the stream."""


class Passed(dict[str, tuple[Tensor, Tensor]]):
    """By name, what a module was given first and what it gave, in its last call."""

    def __missing__(self, name: str) -> tuple[Tensor, Tensor]:
        raise UnsupportedError("experiment", f"{name} was not run, or not on a tensor")


@contextmanager
def passing(modules: Mapping[str, nn.Module]) -> Iterator[Passed]:
    """A context in which a forward leaves here what passes through these modules."""
    found = Passed()
    handles = []
    for name, module in modules.items():

        def leave(m: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            given = args[0] if args else kwargs.get(STREAM)
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(given, Tensor) and isinstance(output, Tensor):
                found[name] = (given, output)

        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def block_of(site: Site) -> str:
    """The path of the block in which a site stands: up to the number of its layer."""
    tower, name = site.tower.split("."), site.name.split(".")
    end = tower.index("*") + 1 if "*" in tower else len(name) - 1
    return ".".join(name[:end])


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """What a linear module makes of x (…,I), without its bias."""
    return module(x) - module(torch.zeros_like(x[..., :1, :]))


def by_head(projection: nn.Module, like: Tensor, heads: int) -> Tensor:
    """The slices (H,E,C) of an output projection that takes heads (B,N,H*E), as `like` is.

    Raises:
        UnsupportedError: its input is not made of so many heads.
    """
    width = like.shape[-1]
    if width % heads:
        raise UnsupportedError("output projection", f"it takes {width} numbers for {heads} heads")
    unit = torch.eye(width, dtype=like.dtype, device=like.device)
    return linear(projection, unit).unflatten(0, (heads, -1))


@contextmanager
def overwritten(
    modules: Mapping[str, nn.Module], values: Mapping[str, Tensor], where: Tensor
) -> Iterator[None]:
    """A context in which these modules give values (K,C), by name, at the K tokens `where` (B,N) is
    True.
    """
    handles = []
    for name, module in modules.items():

        def leave(m: Any, args: Any, output: Any, name: str = name) -> Tensor:
            if not isinstance(output, Tensor) or output.shape[:2] != where.shape:
                raise UnsupportedError("experiment", f"{name} does not give one tensor per token")
            output = output.clone()
            output[where] = values[name].to(output)
            return output

        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
