r"""A plain vision transformer around any mechanism: patches, blocks, one answer per image.

    x = W patches + P        per layer: x = x + mechanism(norm(x)), x = x + FFN(norm(x))
    logits = W_h norm(pool(x))

Pooling is the mean over patches, or a class token that stands before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from regard.backbones.spec import Spec, mechanism
from regard.core.call import Call
from regard.core.errors import ArgumentError
from regard.layers.block import Block
from regard.layers.feedforward import FeedForward


class Vision(nn.Module):
    """Grids of pixels (B, h*w, channels), row-major -> logits (B, classes).

    Args:
        grid: side lengths, of one, two or three axes. channels: per pixel. classes: answers. dim:
            width. layers: one mechanism per layer. heads: of every mechanism. patch: side of a
            patch. hidden: width of the feed-forward networks, default 2 dim, 0 = none. cls: read a
            class token instead of the mean.

    Raises:
        UnsupportedError: a mechanism that does not serve noncausal self-attention on such a grid.
    """

    def __init__(
        self,
        grid: Sequence[int],
        channels: int,
        classes: int,
        dim: int,
        layers: Sequence[Spec],
        *,
        heads: int = 4,
        patch: int = 1,
        hidden: int | None = None,
        cls: bool = False,
    ) -> None:
        super().__init__()
        if patch < 1 or any(side % patch for side in grid):
            raise ArgumentError("patch", f"a divisor of the sides {tuple(grid)}", patch)
        self.pixels, self.patch = tuple(grid), patch
        self.grid = tuple(side // patch for side in grid)
        self.embedding = nn.Linear(channels * patch ** len(self.grid), dim)
        self.positions = nn.Parameter(0.02 * torch.randn(prod(self.grid), dim))
        self.cls = nn.Parameter(0.02 * torch.randn(1, dim)) if cls else None
        hidden = 2 * dim if hidden is None else hidden
        self.blocks = nn.ModuleList(
            Block(
                dim,
                mechanism(spec, dim, heads, "noncausal self", len(self.grid)),
                FeedForward(dim, hidden) if hidden else None,
            )
            for spec in layers
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, pixels: Tensor, notes: dict[str, list[Any]] | None = None) -> Tensor:
        """Logits (B,classes); `notes` collects what the mechanisms leave."""
        if pixels.ndim != 3 or pixels.shape[1] != prod(self.pixels):
            raise ArgumentError(
                "pixels", f"(B, {prod(self.pixels)}, channels)", tuple(pixels.shape)
            )
        x = self.embedding(self._patches(pixels)) + self.positions
        prefix = 0
        if self.cls is not None:
            x, prefix = torch.cat([self.cls.expand(len(x), 1, -1), x], 1), 1
        call = Call(grid=self.grid, prefix=prefix, layers=len(self.blocks), notes=notes)
        for layer, block in enumerate(self.blocks):
            x = block(x, call.but(layer=layer))
        return self.head(self.norm(x[:, 0] if prefix else x.mean(1)))

    def _patches(self, pixels: Tensor) -> Tensor:
        """(B, h*w, c) -> (B, h/p * w/p, p*p*c), row-major inside a patch too."""
        axes = len(self.grid)
        split = [part for side in self.grid for part in (side, self.patch)]
        x = pixels.unflatten(1, split)  # (B, h/p, p, w/p, p, c)
        outer, inner = range(1, 2 * axes, 2), range(2, 2 * axes + 1, 2)
        return x.permute(0, *outer, *inner, 2 * axes + 1).flatten(axes + 1).flatten(1, axes)
