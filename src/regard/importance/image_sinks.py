r"""Sinks among an image's tokens, and weight taken from sinks and given to the rest of the image.

    phi_j = max_{d in D} |x_jd| / sqrt(mean_d x_jd^2 + eps)        j is a sink if phi_j >= tau
    m = sum_{j in I} A_j        r = sum_{j in I, no sink} A_j / m        chosen: m >= m_0, r >= rho
    A'_j = p A_j on sinks      A'_j = A_j (1 + Omega / sum_{k in I, no sink} A_k) if j in I, no sink

x (B,N,C) enters the layer. D: the few dimensions in which a model's sinks are massive, those of its
first token unless they are said. I: the image's keys. Omega = (1 - p) sum_{sinks} A_j, of text and
image alike, so that rows still sum to what they did. Without a sink in the image nothing is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-6


def sink_tokens(
    stream: Tensor, first: Tensor, tau: float, dims: Sequence[int] | None = None
) -> Tensor:
    """Which tokens (B,N) of a stream (B,N,C) are sinks. first (B,): index of the first token, whose
    massive dimensions count unless `dims` says which do.
    """
    x = stream.to(torch.promote_types(stream.dtype, torch.float32))
    size = x.abs() * x.square().mean(-1, keepdim=True).add(EPSILON).rsqrt()
    if dims is not None:
        return (size[..., list(dims)] >= tau).any(-1)
    massive = size[torch.arange(len(size), device=size.device), first] >= tau
    return ((size >= tau) & massive[:, None]).any(-1)


def looks_beside_sinks(
    mass: Tensor, clear: Tensor, rho: float, least: float, slack: Tensor | float = 0.0
) -> Tensor:
    """Whether rows look at an image beside its sinks: their mass (…) on it is at least `least`, and
    the share of it on no sink, clear / mass, at least rho. slack is added to the mass in the share
    on sinks.
    """
    return (mass >= least) & (mass - clear <= (1 - rho) * (mass + slack))


def given_back(weights: Tensor, image: Tensor, sinks: Tensor, rows: Tensor, p: float) -> Tensor:
    """Weights (B,H,N,M) in which, in some rows (B,H,N), sinks (B,M) keep the fraction p of theirs
    and the image's other keys (B,M) get the rest in proportion.
    """
    sink, clear = ((x[:, None, None]).to(weights) for x in (sinks, image & ~sinks))
    taken = (1 - p) * (weights * sink).sum(-1, keepdim=True)
    whole = (weights * clear).sum(-1, keepdim=True)
    gain = taken / whole.masked_fill(whole == 0, 1.0)
    found = weights * (1 - (1 - p) * sink + gain * clear)
    return torch.where(rows[..., None] & (whole > 0), found, weights)
