r"""Received attention: what a key gets, on average, from the queries that may see it.

    r_j = 1/n_j sum_{i sees j} A_ij        n_j: how many real queries see key j

Dividing by n_j and not by N matters for causal attention, where late keys are seen by few.
"""

from __future__ import annotations

from torch import Tensor


def received(weights: Tensor, seen: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Mean weight of each key (B,H,M), zero where no query sees it, and the number of queries that
    do (B,H or 1,M). weights (B,H,N,M); seen boolean (B,H or 1,N,M); real (B,N): queries that are no
    padding.
    """
    judged = seen & real[:, None, :, None]
    count = judged.sum(2)
    return weights.masked_fill(~judged, 0.0).sum(2) / count.clamp_min(1), count
