r"""Boundaries: where attention to the tokens before a gap differs from attention to those after it.

    past_t   = sum_{i >= t + w} sum_{t - w < j <= t} A_ij        A: attention, mean over heads (L,L)
    future_t = sum_{i >= t + w} sum_{t < j <= t + w} A_ij        w: window
    ratio_t  = (max + 1e-6) / (min + 1e-6)                       gap t: between tokens t and t + 1

Gaps too near an end for both windows have ratio 0. Boundaries are the gaps of greatest ratio above
theta, none nearer than `apart` to a greater one.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6


def boundary_ratio(attention: Tensor, window: int, reach: int | None = None) -> Tensor:
    """Ratios (B,L) in float64 of attention (B,L,L); reach: so many queries from t + w on count,
    None = all that follow.
    """
    length = attention.shape[-1]
    ratio = attention.new_zeros(attention.shape[:2], dtype=torch.float64)
    gaps = torch.arange(window - 1, length - window, device=attention.device)
    if len(gaps) == 0:
        return ratio
    sums = torch.nn.functional.pad(attention.double().cumsum(1).cumsum(2), (1, 0, 1, 0))
    first = gaps + window
    last = torch.full_like(gaps, length) if reach is None else (first + reach).clamp_max(length)
    columns = sums[:, last] - sums[:, first]  # (B, gaps, L + 1), queries summed
    at = [
        columns.gather(2, (gaps + s).expand(len(ratio), -1)[..., None])[..., 0]
        for s in (1 - window, 1, 1 + window)
    ]
    past, future = at[1] - at[0], at[2] - at[1]
    ratio[:, gaps] = (torch.maximum(past, future) + EPS) / (torch.minimum(past, future) + EPS)
    return ratio


def soft_labels(ratio: Tensor, sharpness: float = 4.0, turn: float = 1.0) -> Tensor:
    """How much of a boundary each gap is, in (0,1): sigmoid(sharpness log(ratio / turn))."""
    return torch.sigmoid(sharpness * ((ratio + EPS).log() - torch.as_tensor(turn).log()))


def pick_gaps(scores: Tensor, theta: float, most: int, apart: int) -> list[int]:
    """At most `most` gaps of scores (L,), in order: those above theta from the greatest down,
    leaving out any within `apart` of one that was taken; equal ones: the earlier.
    """
    order = scores.argsort(descending=True, stable=True)
    taken: list[int] = []
    near = bytearray(len(scores))
    for gap in order[: int((scores > theta).sum())].tolist():
        if len(taken) == most:
            break
        if not near[gap]:
            taken.append(gap)
            start, stop = max(gap - apart, 0), min(gap + apart + 1, len(near))
            near[start:stop] = b"\1" * (stop - start)
    return sorted(taken)
