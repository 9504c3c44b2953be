r"""Support vector machines over query–key matrices: the W of least norm under which each query
scores one token of its sequence above all others, by at least one.

    min tau |W|_* + |W|_F^2 / 2        z^T W (x_sel - x_t) >= 1 for every other token t

z: (P,n,d)  x: (P,n,T,d)  W: (P,d,d), P problems at a time. tau = 0 gives the Frobenius machine; a
large tau comes near the one of the nuclear norm |W|_*. Solved on the dual, u >= 0 with W = sum_c
u_c C_c, its singular values lessened by tau, by accelerated projected ascent that starts anew where
it overshoots.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 1500
"""Steps of the ascent: enough for margins exact to 1e-9 at the sizes of the study."""


def constraints(x: Tensor, z: Tensor, chosen: Tensor) -> Tensor:
    """Matrices C (P,c,d,d) with <C, W> = z^T W (x_sel - x_t), for chosen tokens (P,n)."""
    index = chosen[..., None, None].expand(-1, -1, 1, x.shape[-1])
    apart = x.gather(2, index) - x
    others = torch.ones_like(x[..., 0], dtype=torch.bool).scatter(2, chosen[..., None], False)
    pairs = torch.einsum("pni,pntj->pntij", z, apart)
    return pairs[others].unflatten(0, (len(x), -1))


def margins(limits: Tensor, w: Tensor) -> Tensor:
    """<C, W> (P,c) for limits (P,c,d,d) and w (P,d,d)."""
    return torch.einsum("pcij,pij->pc", limits, w)


def least_norm(limits: Tensor, tau: float = 0.0, steps: int = STEPS) -> Tensor:
    """The W (P,d,d) of least norm whose margins are at least 1. Where there is none, what comes
    back falls short of them.
    """
    flat = limits.flatten(2)
    rate = 1 / torch.linalg.matrix_norm(flat @ flat.mT, 2)[:, None]
    dual = ahead = flat.new_zeros(flat.shape[:2])
    pace = flat.new_ones(len(flat), 1)
    for _ in range(steps):
        slack = 1 - margins(limits, _primal(limits, ahead, tau))
        new = (ahead + rate * slack).clamp_min(0)
        over = ((ahead - new) * (new - dual)).sum(-1, keepdim=True) > 0
        faster = torch.where(over, 1.0, (1 + (1 + 4 * pace**2).sqrt()) / 2)
        ahead = new + torch.where(over, 0.0, (pace - 1) / faster) * (new - dual)
        dual, pace = new, faster
    return _primal(limits, dual, tau)


def _primal(limits: Tensor, dual: Tensor, tau: float) -> Tensor:
    w = torch.einsum("pc,pcij->pij", dual, limits)
    if tau == 0:
        return w
    left, values, right = torch.linalg.svd(w, full_matrices=False)
    return left * (values - tau).clamp_min(0)[:, None] @ right
