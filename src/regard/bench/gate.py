"""The gate before the clock: a mechanism that computes something wrong is never timed."""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from regard.bench.record import Record
from regard.bench.rivals import Mode, Rivals, Setting, rivals, size_for, work
from regard.bench.spec import Spec
from regard.core.catalog import card

LENGTH = 600  # ragged against blocks and chunks, and long enough for the long-sequence executors
TOLERANCE = 1e-3
SLIGHT = 1e-3


class Gate(Record):
    """What the comparison with the truth found. error: largest deviation of an output or gradient,
    relative to the largest true magnitude; None if it is not finite.
    """

    error: NonNegativeFloat | None
    tolerance: NonNegativeFloat = TOLERANCE
    tokens: PositiveInt

    @property
    def passed(self) -> bool:
        """Whether the mechanism may be timed."""
        return self.error is not None and self.error <= self.tolerance


def gate(spec: Spec, setting: Setting, mode: Mode, length: int = LENGTH) -> Gate:
    """Compare the mechanism with its truth: float64, and dense where it has several forms.

    Raises:
        RegardError: as `rivals`.
    """
    size = size_for(card(spec.name), length)
    measured, truth = rivals(spec, size, setting), rivals(spec, size, setting, truth=True)
    return judged(measured, truth, mode)


def judged(measured: Rivals, truth: Rivals, mode: Mode) -> Gate:
    """Compare outputs, and gradients in mode "backward", of the same input in two precisions.

    Each tensor is judged by its own largest magnitude, but by no less than SLIGHT of the largest
    of all: some gradients, such as that of a bias on all keys, are truly zero.
    """
    got, truths = (work(r.mechanism, r.inputs, r.parameters, mode)() for r in (measured, truth))
    floor = SLIGHT * max(_magnitude(x) for x in truths)
    errors = [relative_error(a, b, floor) for a, b in zip(got, truths, strict=True)]
    finite = all(error < float("inf") for error in errors)
    return Gate(error=max(errors) if finite else None, tokens=measured.tokens)


def relative_error(got: Tensor, truth: Tensor, floor: float = 1e-30) -> float:
    """Largest deviation relative to the largest true magnitude, or to the floor if that is more;
    infinite for other shapes or NaN.
    """
    if got.shape != truth.shape:
        return float("inf")
    worst = _magnitude(got.to(torch.float64) - truth) / max(_magnitude(truth), floor)
    return worst if worst == worst else float("inf")


def _magnitude(x: Tensor) -> float:
    return x.detach().abs().max().item() if x.numel() else 0.0
