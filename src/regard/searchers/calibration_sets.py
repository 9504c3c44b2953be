r"""Calibration sets: the heads that gain when their attention sinks are calibrated, one at a time.

    gain(l, h) = score(only (l, h) calibrated) - score(untouched)        kept if above `least`

The score is taken over all passages together, so that data sets are mixed by passing them together.
The first layers and the last are left out, as published: 2 and 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.scene import Scene
from regard.core.searcher import SearcherCard
from regard.plan import Plan
from regard.searchers.head_sets import (
    SAME,
    Head,
    Heads,
    every_head,
    judging,
    plan_of_heads,
    treating,
)
from regard.searchers.judging import By
from regard.treatments.sink_calibration import SinkCalibration


@dataclass(frozen=True, eq=False)
class Calibrated:
    """What was found: the plan, its heads, and the gain of every head that was tried, alone."""

    plan: Plan
    heads: Heads
    gains: dict[Head, float]
    untouched: float


@dataclass(frozen=True)
class CalibrationSets:
    """treatment: the calibration. by: what to go by. least: the gain that a head must exceed, and
    that of rounding in any case. skip_first, skip_last: layers that are left out.
    """

    treatment: SinkCalibration = field(default_factory=SinkCalibration)
    by: By = "accuracy"
    least: float = 0.0
    skip_first: int = 2
    skip_last: int = 1

    def __post_init__(self) -> None:
        if min(self.skip_first, self.skip_last, self.least) < 0:
            raise ArgumentError("skip_first, skip_last, least", "0 or more", self)

    def run(self, scene: Scene, progress: Callable[[float, str], None] | None = None) -> Calibrated:
        """Try every head of the scene's chain of self-attention alone.

        Raises:
            ArgumentError: no layer is left, or nothing to predict.
        """
        sites = scene.chain[self.skip_first : len(scene.chain) - self.skip_last]
        if not sites:
            raise ArgumentError("skip_first, skip_last", "some layer left", len(scene.chain))
        objective, pool = judging(scene, self.by), every_head(sites)
        untouched = objective(treating(scene, self.treatment, ()))
        gains: dict[Head, float] = {}
        for done, head in enumerate(pool):
            if progress is not None:
                progress(done / len(pool), f"{head[0].name} {head[1]}")
            gains[head] = objective(treating(scene, self.treatment, [head])) - untouched
        if progress is not None:
            progress(1.0, "")
        kept = tuple(head for head in pool if gains[head] > max(self.least, SAME))
        plan = plan_of_heads(scene, self.treatment, kept, "calibrated heads")
        return Calibrated(plan, kept, gains, untouched)


CARD = SearcherCard(
    name="calibration_sets",
    build=CalibrationSets,
    finds="plan",
    papers=(
        Paper(
            "2406.15765",
            "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models "
            "without Training through Attention Calibration",
            2024,
        ),
    ),
    claim=Claim(
        "most heads predict worse without their sinks, a few do not, and trials tell them apart",
        "regard study calibrated_heads",
    ),
)
