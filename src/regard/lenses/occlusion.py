r"""Occlusion: what a model says differently when parts of its input are hidden.

    heat_i(c) = sum_m d_i(m) (1 - m_c) / sum_m (1 - m_c)        0 for a cell never hidden
    d_i(m) = KL(p_i || p_i under m)        p_i: what is predicted at output i, the same text forced

Masks m (1: kept) hide segments, each with probability p = 0.5, at several granularities: regular
stretches of time, or of time and frequency.

    masks = segment_masks((frames, bins), [(8, 4), (16, 8)], count=2000, seed=0)
    heat = occlusion(lambda x: model(x, text).log_softmax(-1), spectrogram, masks)
    frames_of(heat, encoder_frames)     # (I,T,F) to (I,T'), to compare with cross-attention

Source: the saliency with which cross-attention was compared (arXiv 2509.18010). Differs from it:
its segments follow the spectrogram's contours (superpixels); ours are regular.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.errors import ArgumentError

LOWEST = math.log(1e-30)
"""Where log-probabilities under a mask are cut off, so that no divergence is infinite."""


def segments(shape: Sequence[int], cells: Sequence[int]) -> Tensor:
    """Number of the segment of every cell of `shape`, where `cells` is how many segments there are
    along each axis, as even as can be.

    Raises:
        ArgumentError: another number of axes, or more segments than cells.
    """
    if len(shape) != len(cells) or any(not 1 <= c <= s for c, s in zip(cells, shape, strict=True)):
        raise ArgumentError("cells", f"segments along each axis of {tuple(shape)}", tuple(cells))
    number = torch.zeros(tuple(shape), dtype=torch.long)
    for axis, (length, count) in enumerate(zip(shape, cells, strict=True)):
        own = torch.arange(length) * count // length
        number = number * count + own.view(-1, *(1,) * (len(shape) - axis - 1))
    return number


def segment_masks(
    shape: Sequence[int],
    granularities: Sequence[Sequence[int]],
    count: int,
    *,
    hidden: float = 0.5,
    seed: int = 0,
) -> Tensor:
    """Boolean masks (count, *shape), False where hidden; the granularities take turns.

    granularities: segments along each axis, for each. hidden: probability that a segment is.

    Raises:
        ArgumentError: no granularity, a count below 1, a probability outside 0 … 1, or segments
            that do not fit.
    """
    if not granularities or count < 1:
        raise ArgumentError("count", "masks, and granularities to draw them at", count)
    if not 0 < hidden < 1:
        raise ArgumentError("hidden", "a probability between 0 and 1", hidden)
    source = torch.Generator().manual_seed(seed)
    numbers = [segments(shape, cells) for cells in granularities]
    return torch.stack(
        [
            (torch.rand(int(number.max()) + 1, generator=source) >= hidden)[number]
            for number in (numbers[i % len(numbers)] for i in range(count))
        ]
    )


def one_by_one(shape: Sequence[int], cells: Sequence[int]) -> Tensor:
    """Masks (S, *shape) that hide each segment once, alone: for tokens said before, `cells` their
    number.
    """
    number = segments(shape, cells)
    each = torch.arange(int(number.max()) + 1)
    return number != each.view(-1, *(1,) * len(shape))


def occlusion(
    predict: Callable[[Tensor], Tensor],
    x: Tensor,
    masks: Tensor,
    *,
    fill: float = 0.0,
    batch: int = 16,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Heat (I, *shape) of the cells of x (*shape, …) for each of I outputs.

    predict: log-probabilities (n,I,V) of inputs (n, *shape, …). masks: boolean (K, *shape). fill:
    what stands in hidden cells. progress: called with the share that is done.

    Raises:
        ArgumentError: masks of another shape, none, or predictions of another.
    """
    shape = tuple(masks.shape[1:])
    if not shape or not len(masks) or tuple(x.shape[: len(shape)]) != shape:
        raise ArgumentError("masks", f"(K, …) over cells of {tuple(x.shape)}", tuple(masks.shape))
    with torch.no_grad():
        clean = predict(x[None])
        if clean.ndim != 3:
            raise ArgumentError("predict", "log-probabilities (n,I,V)", tuple(clean.shape))
        heat = clean.new_zeros(clean.shape[1], *shape, dtype=torch.float64)
        for start in range(0, len(masks), batch):
            part = masks[start : start + batch].to(x.device)
            kept = part.view(*part.shape, *(1,) * (x.ndim - len(shape)))
            found = predict(torch.where(kept, x, fill))
            moved = divergence(clean, found).double()  # (n,I)
            heat += (moved.mT @ (~part).flatten(1).double()).unflatten(1, shape)
            if progress is not None:
                progress(min(1.0, (start + batch) / len(masks)))
    times = (~masks).sum(0).to(heat)
    return (heat / times.clamp(min=1)).to(clean.dtype)


def divergence(clean: Tensor, changed: Tensor) -> Tensor:
    """KL(p || q) (…) in nats of log-probabilities p, q (…,V); those of q no lower than LOWEST."""
    terms = clean.exp() * (clean.clamp(min=LOWEST) - changed.clamp(min=LOWEST))
    return terms.sum(-1)


def frames_of(heat: Tensor, frames: int, how: Literal["mean", "max"] = "max") -> Tensor:
    """Heat (I,T) or (I,T,F) brought to `frames` steps in time, (I,frames): mean over frequency,
    then mean or maximum within each stretch.

    Raises:
        ArgumentError: more frames than steps, or an unknown way.
    """
    if not 1 <= frames <= heat.shape[1]:
        raise ArgumentError("frames", f"1 to {heat.shape[1]}", frames)
    if how not in ("mean", "max"):
        raise ArgumentError("how", "'mean' or 'max'", how)
    steps = heat if heat.ndim == 2 else heat.mean(-1)
    pool = F.adaptive_max_pool1d if how == "max" else F.adaptive_avg_pool1d
    return pool(steps, frames)
