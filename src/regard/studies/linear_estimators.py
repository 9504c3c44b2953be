r"""Answers to a linear-regression prompt: by heads of softmax attention, by one gradient step, by
ridge regression; and how well such heads can do.

    heads w, mu (H,):        sum_h mu_h sum_i softmax_i(w_h x_i.x_q) y_i
    risk ~ 1 + s2 - 2 mu.w + mu^T A mu        A = w w^T + (1 + s2)/L exp(d w w^T), exp by element

for x ~ N(0, I_d), slopes ~ N(0, I_d / d), noise of variance s2 and L examples. One head is best at
w = 1/sqrt(d), two at opposite w near zero; more bring nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def estimate(x: Tensor, y: Tensor, asked: Tensor, w: Tensor, mu: Tensor) -> Tensor:
    """Answers (B,) of heads w, mu (H,) to asked (B,d) after x (B,L,d), y (B,L)."""
    weights = torch.softmax(torch.einsum("h,bld,bd->bhl", w, x, asked), -1)
    return torch.einsum("h,bhl,bl->b", mu, weights, y)


def gradient_step(x: Tensor, y: Tensor, asked: Tensor, rate: float, *, debiased: bool) -> Tensor:
    """Answers (B,) after one step from zero on half the mean squared error; debiased: with x less
    its mean.
    """
    centre = x.mean(1, keepdim=True) if debiased else 0.0
    slope = torch.einsum("bl,bld->bd", y, x - centre) / x.shape[1]
    return rate * (slope * asked).sum(-1)


def ridge(x: Tensor, y: Tensor, asked: Tensor, penalty: float) -> Tensor:
    """Answers (B,) of ridge regression."""
    gram = x.mT @ x + penalty * torch.eye(x.shape[-1], dtype=x.dtype)
    return (torch.linalg.solve(gram, x.mT @ y[..., None])[..., 0] * asked).sum(-1)


def quadratic(w: Tensor, dim: int, length: int, noise: float) -> Tensor:
    """A (H,H) of heads w (H,)."""
    pairs = torch.outer(w, w)
    return pairs + (1 + noise) / length * torch.exp(dim * pairs)


def best_mu(w: Tensor, dim: int, length: int, noise: float) -> Tensor:
    """The mu (H,) of least risk."""
    return torch.linalg.solve(quadratic(w, dim, length, noise), w)


def risk(w: Tensor, mu: Tensor, dim: int, length: int, noise: float) -> Tensor:
    """Approximate mean squared error of heads w, mu (H,)."""
    return 1 + noise - 2 * mu @ w + mu @ quadratic(w, dim, length, noise) @ mu
