"""What every key head got in a fit, and why: the picture of all, and a line about each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from regard.report.axes import Axis
from regard.report.colours import colour, ink
from regard.report.curves import PanelFrame, path
from regard.report.fit_record import Fit, KeyHead
from regard.report.labels import Box
from regard.report.units import short, short_percent

TOLD = 0.1
"""Metrics below this say little about a head."""


@dataclass(frozen=True)
class Told:
    """One key head: fill and ink of its cell, its rises as a line whose chosen point is `at`, why
    it got its share, and the metrics that say what its query heads do.
    """

    head: KeyHead
    fill: str
    ink: str
    line: str
    at: tuple[float, float]
    why: str
    metrics: tuple[tuple[str, float], ...]

    @property
    def anchor(self) -> str:
        """Where it is explained."""
        return f"L{self.head.layer}.K{self.head.kv_head}"

    @property
    def rise(self) -> float:
        """Of the loss, if this head alone kept the least."""
        return self.head.rises[0]


@dataclass(frozen=True)
class Heads:
    """All key heads. grid: layers with their heads, None where a layer has fewer. frame: of every
    line; top: the rise at its upper edge.
    """

    told: tuple[Told, ...]
    grid: tuple[tuple[int, tuple[Told | None, ...]], ...]
    frame: PanelFrame
    top: float


def heads_of(fit: Fit) -> Heads:
    """The key heads of a fit."""
    shares = fit.config.shares
    top = max(max(head.rises) for head in fit.groups)
    x = Axis(shares[0], 1.0 if shares[0] < 1 else 2.0, (), log=True)
    y = Axis(0.0, top or 1.0, ())
    frame = PanelFrame(x, y, Box(4, 4, 134, 40), 138, 44)
    told = tuple(_told(head, shares, frame) for head in fit.groups)
    width = 1 + max(head.kv_head for head in fit.groups)
    rows: dict[int, list[Told | None]] = {}
    for one in told:
        rows.setdefault(one.head.layer, [None] * width)[one.head.kv_head] = one
    grid = tuple((layer, tuple(rows[layer])) for layer in sorted(rows))
    return Heads(told, grid, frame, top)


def _told(head: KeyHead, shares: Sequence[float], frame: PanelFrame) -> Told:
    fill = colour(math.sqrt(head.share))
    chosen = min(range(len(shares)), key=lambda i: abs(shares[i] - head.share))
    points = [frame.at(s, r) for s, r in zip(shares, head.rises, strict=True)]
    found = sorted(head.metrics.items(), key=lambda item: (-item[1], item[0]))
    return Told(
        head,
        fill,
        ink(fill),
        path(points),
        points[chosen],
        _why(head, shares, head.rises[chosen]),
        tuple((name.replace("_", " "), value) for name, value in found if value >= TOLD),
    )


def _why(head: KeyHead, shares: Sequence[float], rise: float) -> str:
    """In words: what it needs alone, and what it got."""
    enough = next((s for s, r in zip(shares, head.rises, strict=True) if r <= 0), 1.0)
    if head.rises[0] <= 0:
        alone = f"Alone, {short_percent(enough)} is enough: the loss does not rise."
    else:
        alone = f"Alone, keeping {short_percent(shares[0])} costs {short(head.rises[0])} nats, and "
        alone += f"{short_percent(enough)} nothing." if enough < 1 else "only all costs nothing."
    if head.share < enough:
        return f"{alone} It got less, at {short(rise)} nats."
    if head.share > enough:
        return f"{alone} It got more: the budget had room, or other heads lean on it."
    return f"{alone} It got just that."
