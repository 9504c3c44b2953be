r"""Rotary position embedding: pairs of channels turn by an angle proportional to the absolute
position.

    (x_a, x_b) -> (x_a cos t - x_b sin t, x_a sin t + x_b cos t)        t = position * base^(-2c/D),
    c the pair's number

"half" pairs channel c with c + D/2 (Llama, GPT-NeoX), "pairs" pairs neighbours 2c and 2c+1 (the
original paper, 2104.09864).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from regard.core.errors import ArgumentError

Style = Literal["half", "pairs"]


def rotary_angles(positions: Tensor, width: int, base: float = 10000.0) -> Tensor:
    """Angles (…, width/2) of integer or real positions (…)."""
    if width % 2:
        raise ArgumentError("width", "an even head width for rotary positions", width)
    rates = base ** (
        -torch.arange(0, width, 2, device=positions.device, dtype=torch.float64) / width
    )
    return positions.to(torch.float64)[..., None] * rates


def rotate(x: Tensor, angles: Tensor, style: Style = "half") -> Tensor:
    """Turn x (…,N,D) by angles that broadcast to (…,N,D/2)."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    if style == "half":
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    if style == "pairs":
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    raise ArgumentError("style", "'half' or 'pairs'", style)
