r"""Kronecker factors: the curvature of a linear map as a product of two small matrices.

    H ~ A (x) S        A = mean_t x_t x_t^T (I,I), x inputs        S = mean_t d_t d_t^T (O,O)
    (A (x) S + lam)^{-1} G = U_S [ (U_S^T G U_A)_ij / (s_i a_j + lam) ] U_A^T        G (O,I)

d are the loss's gradients by the map's outputs, token by token. The influence of a sample on a
reference set is the product of the reference's gradient, so scaled, with the sample's: how much a
step on the sample lowers the reference's loss, to first order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.errors import ArgumentError


@dataclass(frozen=True, eq=False)
class Factors:
    """A (I,I) and S (O,O) of a linear map."""

    inputs: Tensor
    outputs: Tensor

    def __post_init__(self) -> None:
        for x in (self.inputs, self.outputs):
            if x.ndim != 2 or x.shape[0] != x.shape[1]:
                raise ArgumentError("factors", "square matrices", tuple(x.shape))

    def damping(self, part: float) -> float:
        """lam as a part of the mean eigenvalue of A (x) S."""
        means = [float(x.diagonal().double().mean()) for x in (self.inputs, self.outputs)]
        return part * means[0] * means[1]

    def solved(self, gradient: Tensor, lam: float) -> Tensor:
        """(A (x) S + lam)^{-1} times a gradient (O,I), in double precision.

        Raises:
            ArgumentError: a gradient of another shape, lam not above 0.
        """
        if gradient.shape != (len(self.outputs), len(self.inputs)):
            wanted = (len(self.outputs), len(self.inputs))
            raise ArgumentError("gradient", str(wanted), tuple(gradient.shape))
        if not lam > 0:
            raise ArgumentError("lam", "above 0", lam)
        a, left = torch.linalg.eigh(self.inputs.double())
        s, right = torch.linalg.eigh(self.outputs.double())
        turned = right.T @ gradient.double() @ left
        scaled = turned / (s.clamp_min(0)[:, None] * a.clamp_min(0) + lam)
        return right @ scaled @ left.T


def second_moment(x: Tensor) -> Tensor:
    """Sum over tokens of x x^T (C,C), in double precision, of x (…,C)."""
    rows = x.flatten(0, -2).double()
    return rows.T @ rows
