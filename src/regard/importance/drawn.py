r"""Drawn numbers: a table of random numbers that follows from its seed alone, on every device.

    x_i = hash(hash(seed) + i)        a permutation of 32-bit words with good avalanche

No generator is advanced and none is needed, so a mechanism that samples stays a function of its
arguments, and compiles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def _mixed(x: Tensor) -> Tensor:
    """Words (int64 below 2^32), each mixed on its own: two rounds of multiply and shift."""
    for factor, shift in ((0x7FEB352D, 15), (0x846CA68B, 16)):
        x = ((x ^ (x >> 16)) * factor) & WORD
        x = x ^ (x >> shift)
    return x


def drawn(seed: int, count: int, device: torch.device) -> Tensor:
    """`count` numbers in (0, 1), float64."""
    start = _mixed(torch.tensor([seed & WORD], device=device))
    words = _mixed(_mixed((start + torch.arange(count, device=device)) & WORD))
    return (words.double() + 0.5) / 2.0**32


def drawn_normal(seed: int, count: int, device: torch.device) -> Tensor:
    """`count` standard normal numbers, float64 (by the Box-Muller transform)."""
    radius, angle = drawn(seed, 2 * count, device).chunk(2)
    return (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()
