"""Colour scales that the colour-blind can read, and that stay ordered in black and white."""

from __future__ import annotations

SEQUENTIAL = (
    "#fdf6d8", "#f3dfa0", "#e3c774", "#bcb97c", "#8caa85",
    "#5e9690", "#3b7d93", "#265f88", "#1b3f6e", "#141f4a",
)  # fmt: skip
"""From little to much: pale yellow to dark blue, ever darker."""
DIVERGING = (
    "#0a3c74", "#2f6fae", "#7aaad4", "#bfd6ea", "#f4f4f1",
    "#f5d3a8", "#e2a04e", "#b96a14", "#7a3d05",
)  # fmt: skip
"""From less, blue, over nothing, white, to more, orange."""
SERIES = (
    ("f-scored", "circle"),
    ("f-recurrent", "square"),
    ("f-selected", "triangle"),
    ("f-pooled", "diamond"),
    ("f-free", "cross"),
    ("f-other", "hexagon"),
)
"""CSS class and marker of lines that share a chart, in their order, again and again."""


def colour(part: float, stops: tuple[str, ...] = SEQUENTIAL) -> str:
    """The colour at a part of a scale, 0 to 1, as #rrggbb; parts beyond are those of the ends."""
    place = min(max(part, 0.0), 1.0) * (len(stops) - 1)
    first = min(int(place), len(stops) - 2)
    low, high = (_channels(stop) for stop in stops[first : first + 2])
    mixed = (a + (place - first) * (b - a) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{round(x):02x}" for x in mixed)


def ink(fill: str) -> str:
    """Black or white text (almost), whichever stands out more on a colour #rrggbb."""
    parts = [(channel / 255) ** 2.2 for channel in _channels(fill)]
    light = sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), parts, strict=True))
    return "#1c1e22" if light > 0.2 else "#ffffff"


def _channels(stop: str) -> list[int]:
    return [int(stop[i : i + 2], 16) for i in (1, 3, 5)]
