r"""Map similarity: how alike the attention of layers is, head by head, and which of them may share.

s(a, b) = mean over heads and sequences of cos(A^a_h, A^b_h)        A_h: (N,M), flattened
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.errors import ArgumentError


def map_similarity(maps: Sequence[Tensor], real: Tensor | None = None) -> Tensor:
    """Similarities (L,L) of L layers' maps (B,H,N,M); real (B,N): queries that are no padding.

    Raises:
        ArgumentError: maps of different shapes.
    """
    shapes = {tuple(x.shape) for x in maps}
    if len(shapes) != 1:
        raise ArgumentError("maps", "one shape in all layers", sorted(shapes))
    stacked = torch.stack(tuple(maps))
    if real is not None:
        stacked = stacked.masked_fill(~real[:, None, :, None], 0.0)
    unit = F.normalize(stacked.flatten(3), dim=-1)  # (L,B,H,N*M)
    return torch.einsum("abhx,cbhx->acbh", unit, unit).mean((2, 3))


def head_similarity(maps: Tensor, others: Tensor) -> Tensor:
    """Similarity (B,H) of two layers' maps (B,H,N,M), head by head."""
    return F.cosine_similarity(maps.flatten(2), others.flatten(2), dim=-1)


def alike(
    similarities: Tensor, threshold: float, *, skip_first: int = 1, skip_last: int = 1
) -> tuple[tuple[int, ...], ...]:
    """Blocks of two or more successive layers, each at least `threshold` similar (L,L) to all
    before it in its block; the first and last layers stay on their own.

    Raises:
        ArgumentError: no square of similarities, or negative numbers of layers.
    """
    if similarities.ndim != 2 or len(similarities) != similarities.shape[1]:
        raise ArgumentError("similarities", "(L,L)", tuple(similarities.shape))
    if skip_first < 0 or skip_last < 0:
        raise ArgumentError("skip_first, skip_last", "0 or more", (skip_first, skip_last))
    blocks: list[list[int]] = []
    for layer in range(skip_first, len(similarities) - skip_last):
        if blocks and bool((similarities[layer, blocks[-1]] >= threshold).all()):
            blocks[-1].append(layer)
        else:
            blocks.append([layer])
    return tuple(tuple(block) for block in blocks if len(block) > 1)
