"""What a treatment makes of given attention maps: for looking at them, and to hold against others.

The maps are taken for softmax weights: their logarithms stand in for scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.core.incoming import Chosen, Memory, bare
from regard.core.treating import treat
from regard.core.treatment import Treatment


def treated_maps(
    maps: Tensor,
    treatment: Treatment,
    *,
    heads: tuple[int, ...] | None = None,
    causal: bool = True,
) -> Tensor:
    """Maps (B,H,N,M) of one layer, under a treatment of some of its heads (None: all of them).

    Raises:
        ArgumentError: not four dimensions of floating-point numbers.
    """
    if maps.ndim != 4 or not maps.is_floating_point():
        raise ArgumentError("maps", "(B,H,N,M), floating-point", (tuple(maps.shape), maps.dtype))
    batch, count, _, m = maps.shape
    unit = torch.eye(m, dtype=maps.dtype, device=maps.device).expand(batch, count, m, m)
    scores = maps.clamp_min(torch.finfo(maps.dtype).tiny).log() * m**0.5  # undone by the scale
    step = Chosen(
        0, treatment, tuple(range(count)) if heads is None else heads, frozenset({"prefill"})
    )
    return treat(bare(scores, unit, unit, causal=causal), [step], Memory())
