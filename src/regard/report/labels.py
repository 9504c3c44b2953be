"""Labels beside points of a chart: none covers another, a marker, or the edge of the plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SPACE = 4  # pixels between two labels
GAPS = (7, 12, 20, 30, 42, 56, 74, 96, 122, 152, 190, 240)
# Directions from the point to its label as parts of (half the label + gap), with their cost in
# pixels: beside is read best, above and below next, diagonals last.
DIRECTIONS = (
    (1, 0, 0), (-1, 0, 2), (0, -1, 4), (0, 1, 4),
    (1, 1, 5), (1, -1, 5), (-1, 1, 6), (-1, -1, 6),
    (1, 0.5, 6), (1, -0.5, 6), (-1, 0.5, 7), (-1, -0.5, 7),
    (0.5, 1, 7), (0.5, -1, 7), (-0.5, 1, 8), (-0.5, -1, 8),
)  # fmt: skip
LEADER_FROM = 11.0  # a label further from its point than this many pixels gets a line to it
CROSSING = 40.0  # cost, in pixels, of lying on a thin line
ROUNDS = 2  # times each label is placed, later around all others
RETRIES = 6  # further attempts, with labels that found no room placed first


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Whether the two share area."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def inside(self, other: Box) -> bool:
        """Whether it lies wholly in the other."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )

    def grown(self, by: float) -> Box:
        """The rectangle with a margin."""
        return Box(self.left - by, self.top - by, self.right + by, self.bottom + by)

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """Its point nearest to (x, y)."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)


@dataclass(frozen=True)
class Segment:
    """A straight line in pixels."""

    x1: float
    y1: float
    x2: float
    y2: float

    def crosses(self, box: Box) -> bool:
        """Whether part of the line lies in the rectangle (Liang-Barsky clipping)."""
        enter, leave = 0.0, 1.0
        for start, delta, low, high in (
            (self.x1, self.x2 - self.x1, box.left, box.right),
            (self.y1, self.y2 - self.y1, box.top, box.bottom),
        ):
            if delta == 0:
                if not low < start < high:
                    return False
                continue
            near, far = sorted(((low - start) / delta, (high - start) / delta))
            enter, leave = max(enter, near), min(leave, far)
        return enter < leave

    def meets(self, other: Segment) -> bool:
        """Whether the two lines cut one another."""

        def side(line: Segment, x: float, y: float) -> float:
            return (line.x2 - line.x1) * (y - line.y1) - (line.y2 - line.y1) * (x - line.x1)

        apart = side(self, other.x1, other.y1) * side(self, other.x2, other.y2)
        return apart < 0 and side(other, self.x1, self.y1) * side(other, self.x2, self.y2) < 0


@dataclass(frozen=True)
class Wanted:
    """A label to be placed: the point it belongs to, its size, and the markers at that point."""

    x: float
    y: float
    width: float
    height: float
    own: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Placed:
    """Where a label went, and the line to its point where it is not beside it."""

    box: Box
    leader: Segment | None


@dataclass(frozen=True)
class Scene:
    """What the labels are placed among: markers, which must stay uncovered, thin lines, which may
    be covered at a cost, and the bounds of the plot.
    """

    markers: tuple[Box, ...]
    lines: tuple[Segment, ...]
    bounds: Box


def place(wanted: Sequence[Wanted], scene: Scene) -> list[Placed | None]:
    """A place for every label; None where there is no room left.

    Labels are placed one after the other, in several orders; the result with most labels at the
    least cost is taken.
    """
    everything = range(len(wanted))
    orders = [
        sorted(everything, key=lambda i: (-wanted[i].height, -wanted[i].x)),
        sorted(everything, key=lambda i: wanted[i].x),
        sorted(everything, key=lambda i: -wanted[i].x),
    ]
    tried = [_in_order(wanted, order, scene) for order in orders]
    first = min(range(len(orders)), key=lambda t: _price(wanted, tried[t]))
    order, last = orders[first], tried[first]
    for _ in range(RETRIES):  # labels that found no room go first
        failed = [i for i in everything if last[i] is None]
        if not failed:
            break
        order = failed + [i for i in order if i not in failed]
        last = _in_order(wanted, order, scene)
        tried.append(last)
    found = min(tried, key=lambda spots: _price(wanted, spots))
    return [None if spot is None else spot[1] for spot in found]


Priced = tuple[float, Placed]  # a place and its cost


def _price(wanted: Sequence[Wanted], found: Sequence[Priced | None]) -> tuple[float, float]:
    """Height of the labels without a place, then the cost of the others."""
    lost = sum(label.height for label, spot in zip(wanted, found, strict=True) if spot is None)
    return lost, sum(spot[0] for spot in found if spot is not None)


def _in_order(wanted: Sequence[Wanted], order: Sequence[int], scene: Scene) -> list[Priced | None]:
    """The cheapest free place for each label, one after the other, then again around the rest."""
    done: list[Priced | None] = [None] * len(wanted)
    for _ in range(ROUNDS):
        for i in order:
            others = [spot[1] for j, spot in enumerate(done) if spot is not None and j != i]
            done[i] = _cheapest(wanted[i], others, scene)
    return done


def _cheapest(label: Wanted, others: Sequence[Placed], scene: Scene) -> Priced | None:
    """The cheapest place that covers no marker and no other label."""
    foreign = [m for m in scene.markers if not any(m.overlaps(own) for own in label.own)]
    best: Priced | None = None
    for cost, candidate in _candidates(label):
        if best is not None and cost >= best[0]:
            break
        if not candidate.box.inside(scene.bounds) or _collides(candidate, others, scene):
            continue
        cost += CROSSING * sum(line.crosses(candidate.box) for line in scene.lines)
        if leader := candidate.leader:
            cost += CROSSING * sum(leader.meets(o.leader) for o in others if o.leader)
            cost += 2 * CROSSING * sum(leader.crosses(marker) for marker in foreign)
        if best is None or cost < best[0]:
            best = cost, candidate
    return best


def _collides(candidate: Placed, others: Sequence[Placed], scene: Scene) -> bool:
    """Whether the label would touch a marker, a label or a leader, or its leader a label."""
    box, leader = candidate.box, candidate.leader
    return any(box.overlaps(marker) for marker in scene.markers) or any(
        box.overlaps(other.box.grown(SPACE))
        or (other.leader is not None and other.leader.crosses(box))
        or (leader is not None and leader.crosses(other.box))
        for other in others
    )


def _candidates(label: Wanted) -> Iterator[Priced]:
    """Possible places with their costs, cheapest first."""
    ways = sorted((gap + cost, gap, dx, dy) for gap in GAPS for dx, dy, cost in DIRECTIONS)
    for cost, gap, dx, dy in ways:
        x = label.x + dx * (label.width / 2 + gap)
        y = label.y + dy * (label.height / 2 + gap)
        half_width, half_height = label.width / 2, label.height / 2
        box = Box(x - half_width, y - half_height, x + half_width, y + half_height)
        yield cost, Placed(box, _leader(label, box))


def _leader(label: Wanted, box: Box) -> Segment | None:
    x, y = box.nearest(label.x, label.y)
    length = ((x - label.x) ** 2 + (y - label.y) ** 2) ** 0.5
    if length <= LEADER_FROM:
        return None
    start = 6 / length  # at the marker's edge
    return Segment(label.x + start * (x - label.x), label.y + start * (y - label.y), x, y)
