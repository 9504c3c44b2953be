r"""Token weights: how much each token of a sequence matters, as the attention it receives from all
heads of a layer, brought to a fixed range.

    R_j = sum_h sum_i A_hij        r_j = low + (high - low) (R_j - min R) / (max R - min R)

Early tokens of causal attention are seen by more queries, and R counts that in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.errors import ArgumentError


def rescaled(received: Tensor, low: float = 0.005, high: float = 1.0) -> Tensor:
    """R (…,M) in the range low … high; all `high` where no token differs.

    Raises:
        ArgumentError: an empty range.
    """
    if not low < high:
        raise ArgumentError("low, high", "low < high", (low, high))
    least, most = received.amin(-1, keepdim=True), received.amax(-1, keepdim=True)
    span = most - least
    share = (received - least) / span.masked_fill(span == 0, 1.0)
    return low + (high - low) * torch.where(span == 0, torch.ones_like(share), share)
