"""Receivers of path patching: queries, keys, values or outputs of heads, heard and replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.moment import Moment
from regard.core.outputs import rows_of, with_rows
from regard.core.scene import Scene
from regard.core.treatment import Treatment

Component = Literal["q", "k", "v", "z"]
Receiver = tuple[int, int, Component]
"""Layer, head, and what of it receives: its query, key, value or output."""


def check_receivers(receivers: Sequence[Receiver], scene: Scene) -> None:
    """Raise ArgumentError for a receiver the model does not have, UnsupportedError for keys or
    values that several heads share.
    """
    sites = scene.chain
    for layer, head, component in receivers:
        known = 0 <= layer < len(sites) and 0 <= head < sites[layer].heads
        if not known or component not in get_args(Component):
            got = (layer, head, component)
            raise ArgumentError("receivers", "(layer, head, 'q', 'k', 'v' or 'z')", got)
        if component in ("k", "v") and sites[layer].group > 1:
            raise UnsupportedError("path_patching", "its heads share their keys and values")


@dataclass(frozen=True, eq=False)
class Caught(Treatment):
    """Changes nothing; keeps, by module and component, what arrives at some tokens."""

    where: Tensor
    found: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def inputs(self, at: Moment) -> tuple[Tensor, Tensor, Tensor]:
        for component, x in (("q", at.q), ("k", at.k), ("v", at.v)):
            self.found[at.site.name, component] = rows_of(x, self.where)
        return at.q, at.k, at.v

    def output(self, output: Tensor, at: Moment) -> Tensor:
        self.found[at.site.name, "z"] = rows_of(output, self.where)
        return output


@dataclass(frozen=True, eq=False)
class Delivered(Treatment):
    """Heads' components at some tokens are those of values (K,H,·), by head and component."""

    values: dict[tuple[int, str], Tensor]
    where: Tensor

    def inputs(self, at: Moment) -> tuple[Tensor, Tensor, Tensor]:
        return self._put("q", at.q), self._put("k", at.k), self._put("v", at.v)

    def output(self, output: Tensor, at: Moment) -> Tensor:
        return self._put("z", output)

    def _put(self, component: str, x: Tensor) -> Tensor:
        values = rows_of(x, self.where)
        mine = [head for head, name in self.values if name == component]
        for head in mine:
            values[:, head] = self.values[head, component][:, head]
        return with_rows(x, self.where, values) if mine else x
