"""Where a picture's positions are: its grid of patches and how many tokens stand before them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.moment import Moment
from regard.core.scene import Scene
from regard.core.treatment import Treatment

Grid = tuple[tuple[int, int] | None, int]
"""(h, w) and the number of tokens before; (None, 0) where there is no such grid."""
MOST = 16
"""Class and register tokens that may stand before a grid, at most."""


@dataclass(frozen=True, eq=False)
class Lengths(Treatment):
    """Changes nothing; collects how many keys attention modules see."""

    found: set[int]

    def output(self, output: Tensor, at: Moment) -> Tensor:
        self.found.add(at.k.shape[2])
        return output


def seen_grid(model: Any, inputs: Mapping[str, Any], see: Callable[..., Any]) -> tuple[Any, Grid]:
    """What `see(**inputs)`, a function of a transformers model, gives, and the grid of its picture:
    by its patch size, and by what its attention modules see besides patches.
    """
    found: set[int] = set()
    with torch.no_grad(), Scene.of(model, ()).treated(Lengths(found)):
        output = see(**inputs)
    pixels, config = (
        inputs.get("pixel_values"),
        getattr(model.config, "vision_config", model.config),
    )
    patch = getattr(config, "patch_size", None)
    if pixels is None or pixels.ndim < 4 or patch is None:
        return output, (None, 0)
    sides = (patch, patch) if isinstance(patch, int) else tuple(patch)[-2:]
    grid = (pixels.shape[-2] // sides[0], pixels.shape[-1] // sides[1])
    before = [n - grid[0] * grid[1] for n in found]
    fitting = [n for n in before if 0 <= n <= MOST]
    return output, (grid, min(fitting)) if fitting else (None, 0)
