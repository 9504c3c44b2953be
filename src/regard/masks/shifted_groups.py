r"""Shifted groups: tokens in groups of fixed length; some heads cut half a group later.

    group(i) = (i + shift) // size        shift = size / 2 in the last heads, 0 in the others
    visible: group(i) = group(j)

`wrap` joins the two half groups at the ends of the shifted heads into one, as rolling tokens does;
in that group the first half of the sequence's beginning stands after its end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.blocks import Tiles
from regard.core.errors import ArgumentError
from regard.core.frame import Pairs
from regard.core.mask import Mask


@dataclass(frozen=True)
class ShiftedGroups(Mask):
    """Groups of `size` tokens (even); the last `shifted` of the heads (a fraction) cut half a group
    later. wrap: the published code's rolling, causal by rolled places, which lets the first tokens
    see the last ones.
    """

    size: int
    shifted: float = 0.5
    wrap: bool = False

    def __post_init__(self) -> None:
        if self.size < 2 or self.size % 2:
            raise ArgumentError("ShiftedGroups.size", "an even number", self.size)
        if not 0 <= self.shifted <= 1:
            raise ArgumentError("ShiftedGroups.shifted", "a fraction in [0, 1]", self.shifted)

    def visible(self, pairs: Pairs) -> Tensor:
        shift = self._shift(pairs.h, pairs.heads, pairs.length)
        if not self.wrap:
            return (pairs.query + shift) // self.size == (pairs.key + shift) // self.size
        query, key = ((x + shift) % pairs.length for x in (pairs.query, pairs.key))
        return (query // self.size == key // self.size) & (key <= query)

    def alive(self, pairs: Pairs) -> Tensor:
        if self.wrap:
            return super().alive(pairs)
        shift = self._shift(pairs.h, pairs.heads, pairs.length)
        return (pairs.key + shift) // self.size >= (pairs.query + shift) // self.size

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        if self.wrap:
            return super().bounds(tiles)
        shift = self._shift(tiles.h, tiles.frame.heads, tiles.h)
        q0, q1, k0, k1 = (
            (x + shift) // self.size
            for x in (tiles.query_low, tiles.query_high, tiles.key_low, tiles.key_high)
        )
        return (q0 <= k1) & (k0 <= q1), (q0 == q1) & (k0 == k1) & (q0 == k0)

    def _shift(self, h: Tensor, heads: int, length: Tensor) -> Tensor:
        """Tokens by which each head's groups are moved to the left."""
        late = h >= heads - round(self.shifted * heads)
        half = self.size // 2
        return torch.where(late, length - half if self.wrap else half, 0)
