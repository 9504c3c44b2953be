r"""Head divergence: how far each head's output moves when a part of the input is taken away.

    d_h = ||o_h - o'_h||_2        o (…,H,E): with that part, o': without
    no evidence (d_h := 0): d_h > mean + std over heads and t_h > mean + std, t_h = ||o'_h||_2^2
    aware: d_h above the median over heads

A head that moves far and gives much without that part too is loud rather than aware. std is the
sample's; of an even number of heads the median is the lower of the two in the middle.
"""

from __future__ import annotations

import torch
from torch import Tensor


def divergence(outputs: Tensor, without: Tensor) -> Tensor:
    """d (…,H) of outputs (…,H,E), in at least float32."""
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    return (outputs.to(dtype) - without.to(dtype)).norm(dim=-1)


def loud(moved: Tensor, without: Tensor, *, squared: bool = True) -> Tensor:
    """Heads (…,H) that move far, moved (…,H), and give much without, (…,H,E). squared: whether how
    much they give is the square of their norm.
    """
    size = without.to(moved.dtype).norm(dim=-1)
    return _far(moved) & _far(size.square() if squared else size)


def above_median(values: Tensor, *, midpoint: bool = False) -> Tensor:
    """Which of values (…,H) are above their median. midpoint: between the two in the middle."""
    if midpoint:
        return values > values.quantile(0.5, dim=-1, keepdim=True)
    return values > values.median(dim=-1, keepdim=True).values


def _far(values: Tensor) -> Tensor:
    if values.shape[-1] < 2:
        return torch.zeros_like(values, dtype=torch.bool)
    return values > values.mean(-1, keepdim=True) + values.std(-1, keepdim=True)
