"""Pooling inside the tiles of an image: fewer cells stand for a tile; padded cells do not count."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.features.grid import Sides, to_image, to_tokens

Pool = Literal["none", "avg", "max", "adaptive_avg", "adaptive_max"]
POOLS = ("none", "avg", "max", "adaptive_avg", "adaptive_max")


def region_pool(
    x: Tensor, real: Tensor | None, tile: Sides, pool: Pool, size: int
) -> tuple[Tensor, Tensor | None]:
    """Pool every tile of x (B,T,area,C), `tile` cells high and wide, to (B,T,fewer,C).

    size: side of a pooling window, for the adaptive kinds the number of pooled cells a side. real
    (B,T,area): which cells count, None = all; the second result says where any did.

    Raises:
        ArgumentError: a pooling window larger than the tile.
    """
    if pool == "none" or x.shape[1] == 0:
        return x, real
    if not pool.startswith("adaptive") and size > min(tile):
        raise ArgumentError("pool_size", f"at most the tile's sides {tile}", size)
    image = to_image(x.flatten(0, 1), tile)  # (B*T,C,th,tw)
    if real is None:
        return _unfolded(_pooled(image, pool, size), x), None
    inside = to_image(real.flatten(0, 1)[..., None].to(x.dtype), tile)
    if pool.endswith("max"):
        image = image.masked_fill(inside == 0, float("-inf"))
        found = _pooled(inside, pool, size)
        pooled = _pooled(image, pool, size).masked_fill(found == 0, 0.0)
    else:
        found = _pooled(inside, pool, size)
        sums = _pooled(image.masked_fill(inside == 0, 0.0), pool, size)
        pooled = sums / found.masked_fill(found == 0, 1.0)
    return _unfolded(pooled, x), _unfolded(found > 0, x)[..., 0]


def _pooled(image: Tensor, pool: Pool, size: int) -> Tensor:
    if pool == "avg":
        return F.avg_pool2d(image, size)
    if pool == "max":
        return F.max_pool2d(image, size)
    if pool == "adaptive_avg":
        return F.adaptive_avg_pool2d(image, size)
    return F.adaptive_max_pool2d(image, size)


def _unfolded(image: Tensor, x: Tensor) -> Tensor:
    """(B*T,C,.,.) -> (B,T,fewer,C)."""
    return to_tokens(image).unflatten(0, x.shape[:2])
