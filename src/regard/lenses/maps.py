"""Maps: bringing saliency maps to one size and range, so that they can be joined and compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.errors import ArgumentError


def unit_range(maps: Tensor) -> Tensor:
    """Each map of (B,…) shifted and scaled to 0 … 1; a constant one becomes zeros."""
    flat = maps.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    span = high - low
    scaled = (flat - low) / span.masked_fill(span == 0, 1.0)
    return scaled.view_as(maps)


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B,h,w) at another size, bilinearly."""
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def product(layers: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Maps (B,h,w) of several layers joined: each brought to `size` and to 0 … 1, then multiplied.

    Raises:
        ArgumentError: no layer.
    """
    if not layers:
        raise ArgumentError("layers", "one map or more", 0)
    return torch.stack([unit_range(resized(x, size)) for x in layers]).prod(0)
