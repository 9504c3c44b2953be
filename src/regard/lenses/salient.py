r"""Salient relevance: where a map of relevance stands out from all the rest of it, as an eye would
see it. The map's absolute values, scaled to 0 … 1, are looked at as a grey image:

    d(i, j) = |p_i - p_j| / (1 + 3 |i - j|)            patches at i and j, both distances at most 1
    S_r(i) = 1 - exp(-mean of d(i, j) over the 64 most similar patches j at scales r, r/2, r/4)
    S = mean_r S_r (1 - distance to the nearest i' with S(i') > 0.8)     r in 1, 0.8, 0.5, 0.3

A patch is salient if even those most like it differ, and the more, the nearer these are; things
draw attention to their surroundings. Patches stand half a patch apart; the longer side of the image
is at most 250 pixels. The 0.8 is of the range of S.

Source: context-aware saliency (doi:10.1109/TPAMI.2011.272), as the second half of "Beyond saliency"
(arXiv 1712.08268). Differs from it: no prior for the centre of the image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.lenses.maps import resized, unit_range

SCALES = (1.0, 0.8, 0.5, 0.3)
FINER = (1.0, 0.5, 0.25)
ROWS = 512
"""Patches compared with all others at a time."""


def salient_relevance(
    relevance: Tensor, *, patch: int = 7, neighbours: int = 64, largest: int = 250
) -> Tensor:
    """Salient relevance (B,H,W), 0 to 1, of relevance (B,H,W) or (B,C,H,W), whose channels add up;
    zeros for a constant map.

    Raises:
        ArgumentError: another shape, a side shorter than a patch, an even patch, a count below 1.
    """
    if relevance.ndim not in (3, 4):
        raise ArgumentError("relevance", "(B,H,W) or (B,C,H,W)", tuple(relevance.shape))
    if patch < 1 or patch % 2 == 0:
        raise ArgumentError("patch", "an odd number of pixels", patch)
    if neighbours < 1:
        raise ArgumentError("neighbours", "1 or more", neighbours)
    height, width = relevance.shape[-2:]
    if min(height, width) < patch:
        raise ArgumentError("relevance", f"sides of {patch} pixels or more", (height, width))
    whole = relevance if relevance.ndim == 3 else relevance.sum(1)
    image = unit_range(whole.abs())
    ratio = min(1.0, largest / max(height, width))
    small = resized(image, (max(patch, round(height * ratio)), max(patch, round(width * ratio))))
    found = torch.stack([_stands_out(x, patch, neighbours) for x in small])
    return resized(found, (height, width))


def _stands_out(image: Tensor, patch: int, neighbours: int) -> Tensor:
    """Saliency (h,w) of a grey image (h,w)."""
    maps = [_at_scale(image, scale, patch, neighbours) for scale in SCALES]
    mean = torch.stack([x for x in maps if x is not None]).mean(0)
    focus = unit_range(mean[None])[0] > 0.8
    if not bool(focus.any()):
        return mean
    away = _nearest(_centres(focus.shape, image), focus.nonzero().to(image))
    longest = max(focus.shape)
    return mean * (1 - (away / longest).clamp(max=1).view_as(mean))


def _at_scale(image: Tensor, scale: float, patch: int, neighbours: int) -> Tensor | None:
    """Saliency at one scale, resized to the image; None: a patch does not fit."""
    own = _patches(image, scale, patch)
    if own is None:
        return None
    finer = [_patches(image, scale * f, patch) for f in FINER]
    content, place = (torch.cat(x) for x in zip(*(f[:2] for f in finer if f), strict=True))
    found = []
    for rows, where in zip(own[0].split(ROWS), own[1].split(ROWS), strict=True):
        difference = _distances(rows, content) / patch  # at most 1 for values in 0 … 1
        distance = difference / (1 + 3 * _distances(where, place))
        count = min(neighbours + 1, len(content))  # the nearest is the patch itself
        found.append(distance.topk(count, largest=False).values.sum(1) / max(count - 1, 1))
    saliency = 1 - torch.cat(found).neg().exp()
    return resized(saliency.view(1, *own[2]), (image.shape[0], image.shape[1]))[0]


def _patches(
    image: Tensor, scale: float, patch: int
) -> tuple[Tensor, Tensor, tuple[int, int]] | None:
    """Patches (P, patch²) of an image at a scale, their centres (P,2) as shares of its longer side,
    and their arrangement; None: it is smaller than a patch.
    """
    shape = tuple(round(side * scale) for side in image.shape)
    if min(shape) < patch:
        return None
    shrunk = resized(image[None], (shape[0], shape[1]))[:, None]
    half = patch // 2
    padded = F.pad(shrunk, (half, half, half, half), mode="replicate")
    stride = half + 1
    content = F.unfold(padded, patch, stride=stride)[0].mT
    rows, columns = ((side - 1) // stride + 1 for side in shape)
    place = _centres((rows, columns), image) * stride / max(shape)
    return content, place, (rows, columns)


def _centres(shape: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
    """Rows and columns (P,2) of a grid."""
    sides = [torch.arange(side, device=like.device, dtype=like.dtype) for side in shape]
    return torch.cartesian_prod(*sides)


def _nearest(places: Tensor, others: Tensor) -> Tensor:
    """Distance (P,) from each place (P,2) to the nearest of others (Q,2)."""
    return torch.cat([_distances(rows, others).amin(1) for rows in places.split(ROWS)])


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (P,Q) of a (P,n) and b (Q,n), exactly zero between equals."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
