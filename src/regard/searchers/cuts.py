"""Cuts: which slices of a model's parameters stay, noted by module, made by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from regard.core.errors import UnsupportedError
from regard.core.linears import root_mean_square, turned


class Cuts:
    """Slices along the sides of linear maps. names: where each module of the model stands."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        self.names = names
        self.slices: dict[str, list[tuple[int, Tensor]]] = {}
        self.factors: dict[str, float] = {}

    def rows(self, module: nn.Module, kept: Sequence[int], parts: int) -> None:
        """Keep these of the parts, equal in size, of what a linear map gives, bias included."""
        self._note(module, "weight", 1 if turned(module) else 0, kept, parts)
        if getattr(module, "bias", None) is not None:
            self._note(module, "bias", 0, kept, parts)

    def columns(self, module: nn.Module, kept: Sequence[int], parts: int) -> None:
        """Keep these of the parts of what a linear map takes (of an embedding: gives)."""
        self._note(module, "weight", 0 if turned(module) else 1, kept, parts)

    def norm(self, module: nn.Module, kept: Sequence[int], width: int) -> None:
        """Keep these channels of a norm, whose weight makes up for those that go.

        Raises:
            UnsupportedError: not a weight times x over its root mean square.
        """
        if not root_mean_square(module, width):
            raise UnsupportedError(
                "slimming", f"{self.names[module]} is no plain root-mean-square norm"
            )
        self._note(module, "weight", 0, kept, width)
        self.factors[f"{self.names[module]}.weight"] = (width / len(kept)) ** 0.5

    def _note(
        self, module: nn.Module, what: str, side: int, kept: Sequence[int], parts: int
    ) -> None:
        name = f"{self.names[module]}.{what}"
        size = getattr(module, what).shape[side] // parts
        index = torch.tensor(kept)[:, None] * size + torch.arange(size)
        self.slices.setdefault(name, []).append((side, index.flatten()))

    def cut(self, name: str, given: Tensor) -> Tensor:
        """A copy of what stays of a parameter."""
        found = given.clone()
        for side, index in self.slices.get(name, ()):
            found = found.index_select(side, index.to(given.device))
        return found * self.factors[name] if name in self.factors else found
