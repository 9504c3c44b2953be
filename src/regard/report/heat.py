"""A matrix as a picture of coloured cells with axes and a scale; a template draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regard.report.colours import DIVERGING, SEQUENTIAL, colour
from regard.report.labels import Box

LARGEST = 160
"""Rows or columns drawn at most; beyond, neighbours are averaged."""
SHADES = 64
PLOT = Box(46.0, 26.0, 366.0, 0.0)
LEAST = 150.0
"""Height of a picture of few rows."""
SCALE = 76.0
"""Width of the scale beside the picture, numbers included."""


@dataclass(frozen=True)
class Heat:
    """A picture: `cells` are colours with the path of all cells that have them; averaged: rows and
    columns that share one cell.
    """

    title: str
    rows: str
    columns: str
    width: float
    height: float
    plot: Box
    cells: tuple[tuple[str, str], ...]
    unknown: str
    row_ticks: tuple[tuple[float, str], ...]
    column_ticks: tuple[tuple[float, str], ...]
    shades: tuple[tuple[float, str], ...]
    low: float
    high: float
    averaged: tuple[int, int]


def heat(title: str, rows: str, columns: str, values: Sequence[Sequence[float]]) -> Heat:
    """The picture of a matrix; numbers that are not finite are left grey."""
    matrix, averaged = _reduced(np.asarray(values, dtype=np.float64).reshape(len(values), -1))
    count, width = matrix.shape
    cell = (PLOT.right - PLOT.left) / max(width, 1)
    tall = min(max(cell, LEAST / max(count, 1)), 48.0)
    plot = Box(PLOT.left, PLOT.top, PLOT.right, PLOT.top + tall * count)
    finite = matrix[np.isfinite(matrix)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    stops = SEQUENTIAL
    if low < 0 < high:
        high = max(-low, high)
        low, stops = -high, DIVERGING
    shades = np.where(
        np.isfinite(matrix),
        np.round((SHADES - 1) * (matrix - low) / (high - low)) if high > low else SHADES // 2,
        -1,
    )
    paths = _paths(shades, plot, cell, tall)
    return Heat(
        title,
        rows,
        columns,
        plot.right + SCALE,
        plot.bottom + 36,
        plot,
        tuple((colour(s / (SHADES - 1), stops), p) for s, p in paths.items() if s >= 0),
        paths.get(-1, ""),
        _ticks(count, averaged[0], plot.top, tall, 16.0),
        _ticks(width, averaged[1], plot.left, cell, 28.0),
        tuple((i / 32, colour(1 - (i + 0.5) / 32, stops)) for i in range(32)),
        low,
        high,
        averaged,
    )


def _reduced(matrix: NDArray[np.float64]) -> tuple[NDArray[np.float64], tuple[int, int]]:
    """A large matrix with blocks of neighbours averaged, and the blocks' size."""
    steps = tuple(max(1, -(-size // LARGEST)) for size in matrix.shape)
    if steps == (1, 1):
        return matrix, (1, 1)
    pads = [(0, -size % step) for size, step in zip(matrix.shape, steps, strict=True)]
    padded = np.pad(matrix, pads, constant_values=np.nan)
    blocks = padded.reshape(padded.shape[0] // steps[0], steps[0], -1, steps[1])
    known = np.isfinite(blocks)
    total, number = np.where(known, blocks, 0.0).sum((1, 3)), known.sum((1, 3))
    return np.where(number > 0, total / np.maximum(number, 1), np.nan), (steps[0], steps[1])


def _paths(shades: NDArray[np.float64], plot: Box, cell: float, tall: float) -> dict[int, str]:
    """One path per shade, runs of equal cells as one rectangle."""
    found: dict[int, list[str]] = {}
    for i, row in enumerate(shades.astype(int).tolist()):
        start = 0
        for j in range(1, len(row) + 1):
            if j == len(row) or row[j] != row[start]:
                left, top = plot.left + start * cell, plot.top + i * tall
                across = f"{(j - start) * cell:.2f}"
                text = f"M{left:.2f} {top:.2f}h{across}v{tall:.2f}h-{across}z"
                found.setdefault(row[start], []).append(text)
                start = j
    return {shade: "".join(parts) for shade, parts in found.items()}


def _ticks(
    count: int, averaged: int, start: float, size: float, apart: float
) -> tuple[tuple[float, str], ...]:
    """Numbers at the middle of rows or columns, not too near to each other."""
    least = max(1, math.ceil(apart / size))
    power = 10 ** math.floor(math.log10(least))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= least)
    return tuple(
        (round(start + (i + 0.5) * size, 1), f"{i * averaged:,}") for i in range(0, count, step)
    )
