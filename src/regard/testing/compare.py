"""How results are compared: exactly, or relative to the scale of what is expected."""

from __future__ import annotations

import torch
from torch import Tensor


def error(got: Tensor, expected: Tensor, floor: float = 1e-30) -> float:
    """Largest deviation relative to the largest expected magnitude (at least `floor`); NaN counts
    as infinite.
    """
    if got.shape != expected.shape:
        raise AssertionError(f"shape {tuple(got.shape)} where {tuple(expected.shape)} is expected")
    if got.numel() == 0:
        return 0.0
    wide_got, wide = got.detach().to(torch.float64), expected.detach().to(torch.float64)
    worst = ((wide_got - wide).abs().max() / wide.abs().max().clamp_min(floor)).item()
    return worst if worst == worst else float("inf")


def close(
    got: Tensor, expected: Tensor, what: str, tolerance: float = 1e-9, floor: float = 1e-30
) -> None:
    """Raise AssertionError unless the error, relative to the largest expected magnitude but at
    least to `floor`, stays within the tolerance.
    """
    worst = error(got, expected, floor)
    if not worst <= tolerance:
        raise AssertionError(f"{what}: relative error {worst:.2e} > {tolerance:.0e}")


def same(got: Tensor, expected: Tensor, what: str) -> None:
    """Raise AssertionError unless both are equal to the last bit."""
    if not torch.equal(got, expected):
        raise AssertionError(f"{what}: not equal, relative error {error(got, expected):.2e}")


def finite(x: Tensor | None, what: str) -> None:
    """Raise AssertionError unless every entry is finite (a missing gradient counts as finite)."""
    if x is not None and not torch.isfinite(x).all():
        raise AssertionError(f"{what}: {int((~torch.isfinite(x)).sum())} entries are not finite")
