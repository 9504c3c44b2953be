r"""Taylor features: an inner product of them is the second-order expansion of the exponential.

    phi(x) = [1, x, vec(x x^T) / sqrt 2]        phi(q)·phi(k) = 1 + q·k + (q·k)^2 / 2 ≈ e^(q·k)

x: (…,D) -> phi: (…,1+D+D^2). The sum is at least 1/2, so it can be divided by (Based, 2402.18668).
"""

from __future__ import annotations

import torch
from torch import Tensor


def taylor_features(x: Tensor) -> Tensor:
    """(…,D) -> (…,1+D+D^2)."""
    squares = (x[..., :, None] * x[..., None, :]).flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x, squares * 2**-0.5], -1)
