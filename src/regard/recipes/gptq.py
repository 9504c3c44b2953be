r"""GPTQ: weights rounded column by column, each error made up for by the columns not yet rounded.

    H = 2/n sum_sequences sum_t r_t x_t x_t^T        x_t: (I,) what the map reads, r_t: weights of
    tokens, of mean 1 in each of n sequences
    w_j <- round(w_j)        w_k <- w_k - e_j U_jk / U_jj for k > j, U^T U = H^-1, U upper

What is made small is tr((W - W') H (W - W')^T), the weighted error of the outputs. A weight takes
one of 2^bits values of a grid per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.errors import ArgumentError

DAMP, TRIES = 0.01, 20  # added to H's diagonal, as a part of its mean, and how often at most
POWER, LEAST, CLIPS = 2.4, 0.2, 80  # of the error that clipping makes small; clips that are tried


class Curvature:
    """The running mean H (I,I) of what a map reads, in double precision."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.sequences = 0

    def add(self, x: Tensor, weights: Tensor, real: Tensor | None = None) -> None:
        """Take in sequences x (B,N,I) with weights of their tokens (B,N), at real ones (B,N)."""
        real = torch.ones_like(weights, dtype=torch.bool) if real is None else real
        weights = weights.double().masked_fill(~real, 0.0)
        mean = weights.sum(-1, keepdim=True) / real.sum(-1, keepdim=True)
        root = (weights / mean).sqrt()
        flat = (x.double().masked_fill(~real[..., None], 0.0) * root[..., None]).flatten(0, 1)
        self.total += 2 * flat.mT @ flat
        self.sequences += len(x)

    @property
    def matrix(self) -> Tensor:
        """H (I,I).

        Raises:
            ArgumentError: nothing was taken in.
        """
        if not self.sequences:
            raise ArgumentError("batches", "one sequence or more", 0)
        return self.total / self.sequences


@dataclass(frozen=True, eq=False)
class Grid:
    """Values that a row's weights may take: scale (O,1) times (integers - zero (O,1))."""

    scale: Tensor
    zero: Tensor
    low: int
    high: int

    @classmethod
    def of(cls, weight: Tensor, bits: int, *, symmetric: bool = True, clip: bool = True) -> Grid:
        """The grid of a weight (O,I). symmetric: around zero. clip: leave out extreme values where
        that makes the error of all smaller.

        Raises:
            ArgumentError: bits outside 2 to 16.
        """
        if not 2 <= bits <= 16:
            raise ArgumentError("bits", "2 to 16", bits)
        top, low = weight.amax(1, keepdim=True), weight.amin(1, keepdim=True)
        found = cls._between(low, top, bits, symmetric)
        if not clip:
            return found
        best = found.error(weight)
        for share in torch.linspace(1.0, LEAST, CLIPS + 1)[1:].tolist():
            other = cls._between(low * share, top * share, bits, symmetric)
            error = other.error(weight)
            better = error < best
            scale = torch.where(better, other.scale, found.scale)
            zero = torch.where(better, other.zero, found.zero)
            found, best = cls(scale, zero, found.low, found.high), torch.minimum(best, error)
        return found

    @classmethod
    def _between(cls, low: Tensor, top: Tensor, bits: int, symmetric: bool) -> Grid:
        if symmetric:
            half = 2 ** (bits - 1)
            size = torch.maximum(top.abs(), low.abs())
            scale = (size / (half - 1)).masked_fill(size == 0, 1.0)
            return cls(scale, torch.zeros_like(scale), -half, half - 1)
        low, top = low.clamp_max(0.0), top.clamp_min(0.0)
        scale = ((top - low) / (2**bits - 1)).masked_fill(top == low, 1.0)
        return cls(scale, (-low / scale).round(), 0, 2**bits - 1)

    def rounded(self, weight: Tensor) -> Tensor:
        """The nearest values of the grid, for a weight (O,·)."""
        whole = (weight / self.scale + self.zero).round().clamp(self.low, self.high)
        return self.scale * (whole - self.zero)

    def error(self, weight: Tensor) -> Tensor:
        """Sum of |w - round(w)|^2.4 by row, (O,1)."""
        return (weight - self.rounded(weight)).abs().pow(POWER).sum(1, keepdim=True)


def gptq(weight: Tensor, curvature: Tensor, grid: Grid, *, block: int = 128) -> Tensor:
    """A weight (O,I) on its grid, given H (I,I). block: columns between two updates of all others.

    Raises:
        ArgumentError: H is not positive, however it is damped.
    """
    left = weight.to(curvature.dtype).clone()
    unread = curvature.diagonal() == 0
    left[:, unread] = 0.0
    factor = _factor(curvature + torch.diag(unread.to(curvature.dtype)))
    for start in range(0, left.shape[1], block):
        end = min(start + block, left.shape[1])
        errors = torch.zeros_like(left[:, start:end])
        for j in range(start, end):
            rounded = grid.rounded(left[:, j : j + 1])
            error = (left[:, j : j + 1] - rounded) / factor[j, j]
            left[:, j + 1 : end] -= error * factor[j, j + 1 : end]
            left[:, j : j + 1], errors[:, j - start : j - start + 1] = rounded, error
        left[:, end:] -= errors @ factor[start:end, end:]
    return left.to(weight.dtype)


def _factor(curvature: Tensor) -> Tensor:
    """U (I,I), upper, with U^T U = H^-1."""
    step = DAMP * curvature.diagonal().mean() * torch.eye(len(curvature)).to(curvature)
    for tries in range(1, TRIES + 1):
        root, failed = torch.linalg.cholesky_ex(curvature + tries * step)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(root), upper=True)
            if not failed:
                return upper
    raise ArgumentError("curvature", "a positive matrix", "one that is not")


def weighted_error(weight: Tensor, other: Tensor, curvature: Tensor) -> Tensor:
    """tr((W - W') H (W - W')^T), a scalar."""
    gap = (weight - other).to(curvature.dtype)
    return ((gap @ curvature) * gap).sum()
