r"""Fake quantisation by blocks: what symmetric integers with one scale per block would hold.

    x -> round(x / s) s        s = max |x| of the block / (2^(bits-1) - 1)

Gradients pass as if nothing had been rounded.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from regard.core.errors import ArgumentError


def quantised(x: Tensor, bits: int, rows: int, columns: int | None = None) -> Tensor:
    """x (…,N,M) with a scale for each block of `rows` by `columns` entries (None: whole rows); the
    last blocks may be smaller.
    """
    if not 2 <= bits <= 16:
        raise ArgumentError("bits", "2 to 16", bits)
    n, m = x.shape[-2:]
    if not x.numel():
        return x
    columns = m if columns is None else columns
    filled = F.pad(x.detach(), (0, -m % columns, 0, -n % rows))
    tiles = filled.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))  # (…,a,rows,b,columns)
    scale = tiles.abs().amax((-3, -1), keepdim=True) / (2 ** (bits - 1) - 1)
    scale = scale.masked_fill(scale == 0, 1.0)
    rounded = ((tiles / scale).round() * scale).flatten(-4, -3).flatten(-2)
    return x + (rounded[..., :n, :m] - x.detach())
