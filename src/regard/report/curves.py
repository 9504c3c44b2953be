"""Learning curves as small panels that share one frame; a template draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from regard.report.axes import Axis
from regard.report.labels import Box


@dataclass(frozen=True)
class Panel:
    """Learning curves of one row: path of the mean over seeds, outline of their span, and where
    the row reaches its mark.
    """

    mean: str
    band: str
    dots: tuple[tuple[float, float], ...]
    stops: tuple[tuple[float, float], ...]
    reached: float | None


@dataclass(frozen=True)
class PanelFrame:
    """The frame all panels share: sizes in pixels and axes."""

    x: Axis
    y: Axis
    plot: Box
    width: float = 220
    height: float = 132

    def at(self, step: float, accuracy: float) -> tuple[float, float]:
        """Pixel position of a value."""
        plot = self.plot
        return (
            round(plot.left + self.x.part(step) * (plot.right - plot.left), 1),
            round(plot.bottom - self.y.part(accuracy) * (plot.bottom - plot.top), 1),
        )


Seed = Sequence[tuple[float, float]]


def panel(
    frame: PanelFrame, seeds: Sequence[Seed], stopped: Sequence[bool], reached: float | None
) -> Panel:
    """Curves of one row from (step, accuracy) per seed.

    A seed with fewer points is interpolated, and keeps its last value once it ended. stopped: which
    seeds diverged: their ends are marked.
    """
    filled = [seed for seed in seeds if seed]
    steps = sorted({step for seed in filled for step, _ in seed})
    ends = [frame.at(*s[-1]) for s, bad in zip(seeds, stopped, strict=True) if s and bad]
    at = None if reached is None else frame.at(reached, frame.y.low)[0]
    if not steps:
        return Panel("", "", (), tuple(ends), at)
    values = np.array([np.interp(steps, [p[0] for p in s], [p[1] for p in s]) for s in filled])
    mean = [frame.at(x, y) for x, y in zip(steps, values.mean(0), strict=True)]
    top = [frame.at(x, y) for x, y in zip(steps, values.max(0), strict=True)]
    bottom = [frame.at(x, y) for x, y in zip(steps, values.min(0), strict=True)]
    band = path([*top, *bottom[::-1]]) + "z" if top != bottom and len(steps) > 1 else ""
    return Panel(path(mean), band, tuple(mean) if len(mean) == 1 else (), tuple(ends), at)


def path(points: Sequence[tuple[float, float]]) -> str:
    """SVG path through points."""
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
