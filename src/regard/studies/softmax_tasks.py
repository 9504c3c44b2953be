r"""Softmax regression tasks, and one gradient step on them.

    L(x) = |f(x) - b|^2 / 2        f(x) = softmax(A x)        A: (n,d), a row per token  b: (n,)
    grad L(x) = A^T (diag f - f f^T) (f - b)

The step is taken from x = 0, where every token is predicted alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RATES = torch.logspace(-1, 4, 101).tolist()
"""Step sizes eta to choose from."""


@dataclass(frozen=True, eq=False)
class Tasks:
    """Tasks A (B,n,d) and b (B,n)."""

    a: Tensor
    b: Tensor

    @staticmethod
    def drawn(count: int, n: int, dim: int, size: float, draw: torch.Generator) -> Tasks:
        """A: Gaussian with standard deviation `size`; b: the predictions of Gaussian weights."""
        a = size * torch.randn(count, n, dim, generator=draw)
        return Tasks(a, predicted(a, torch.randn(count, dim, generator=draw)))

    def objective(self, f: Tensor) -> Tensor:
        """Mean of |f - b|^2 / 2 for predictions f (B,n)."""
        return (f - self.b).square().sum(-1).mean() / 2

    def gradient(self, x: Tensor) -> Tensor:
        """Gradient (B,d) of each task's objective at x (B,d)."""
        f = predicted(self.a, x)
        residual = f - self.b
        back = f * (residual - (f * residual).sum(-1, keepdim=True))
        return (self.a.mT @ back[..., None])[..., 0]

    def step(self, rate: float) -> Tensor:
        """x' (B,d) after one step from zero."""
        return -rate * self.gradient(torch.zeros_like(self.a[:, 0]))

    def fitted_rate(self) -> float:
        """The step size that leaves the least objective."""
        return min(RATES, key=lambda r: float(self.objective(predicted(self.a, self.step(r)))))


def predicted(a: Tensor, x: Tensor) -> Tensor:
    """f (B,n) of A (B,n,d) and x (B,d)."""
    return (a @ x[..., None])[..., 0].softmax(-1)
