"""What the executors promise: ratios to be reached in one run, as data.

Every target says what is measured and its bound; `regard bench targets` measures them all with
scaled_dot_product_attention timed in turn, and prints what was reached, passed or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from regard.bench.block_sparse import Sparse
from regard.bench.delta_rule import GatedDelta
from regard.bench.high_low import HighLow
from regard.bench.probes import (
    MIB,
    Cut,
    Growth,
    Neighbours,
    Peak,
    Probe,
    ReadShare,
    RoofShare,
)
from regard.bench.rivals import Setting
from regard.bench.spec import Spec
from regard.core.unit import WORKSPACE


@dataclass(frozen=True)
class Target:
    """A promise: `probe` measures a number in `unit`, to be at least or at most `bound`."""

    name: str
    probe: Probe
    sense: Literal["at least", "at most"]
    bound: float

    def kept(self, reached: float) -> bool:
        """Whether a measured number keeps the promise."""
        return reached >= self.bound if self.sense == "at least" else reached <= self.bound


WINDOW = Spec(name="sliding_window", options={"window": 256, "sinks": 0, "impl": "tiled"})
DECAY = Spec(name="lightning")
RELATIVE = Spec(name="music_transformer")
SIGMOID = Spec(name="sigmoid")
TILED = Spec(name="softmax", options={"impl": "tiled"})
NEAR = Spec(name="neighborhood", options={"kernel": 7})

TARGETS: tuple[Target, ...] = (
    Target("window 256, causal", Cut(WINDOW, 8192), "at least", 5),
    Target("window 256, causal", Cut(WINDOW, 16384), "at least", 10),
    Target("window 256, causal", Cut(WINDOW, 8192, "backward"), "at least", 4),
    Target("random blocks, density 0.05", Sparse(0.05, 8192), "at most", 1.8),
    Target("random blocks, density 0.1", Sparse(0.1, 8192), "at most", 1.4),
    Target("random blocks, density 0.25", Sparse(0.25, 8192), "at most", 1.4),
    Target("linear with decay, causal", Cut(DECAY, 8192), "at least", 8),
    Target("linear with decay, causal", Cut(DECAY, 16384), "at least", 16),
    Target("linear with decay, causal", Cut(DECAY, 8192, "backward"), "at least", 5),
    Target("linear with decay, causal", Growth(DECAY, 16384, 32768), "at most", 2.2),
    Target("linear with decay, causal", RoofShare(DECAY, 16384), "at least", 0.3),
    Target("relative positions, causal", Cut(RELATIVE, 4096, inverse=True), "at most", 1.7),
    Target("relative positions, causal", Peak(RELATIVE, 4096), "at most", 8 * 4096**2 * 4 / MIB),
    Target("sigmoid, causal", Cut(SIGMOID, 4096, inverse=True), "at most", 1.5),
    Target("delta-rule recurrence", GatedDelta(4096), "at least", 2),
    Target("delta-rule recurrence", GatedDelta(4096, "backward"), "at least", 2),
    Target(
        "2-D neighbourhood, window 7",
        Neighbours(NEAR, (56, 56), Setting(heads=4, head_dim=32)),
        "at least",
        1,
    ),
    Target("softmax through tiles", Peak(TILED, 32768), "at most", WORKSPACE / MIB),
    Target("window 256 through tiles", Peak(WINDOW, 32768), "at most", WORKSPACE / MIB),
    Target("sigmoid through tiles", Peak(SIGMOID, 32768), "at most", WORKSPACE / MIB),
    Target("relative positions through tiles", Peak(RELATIVE, 32768), "at most", WORKSPACE / MIB),
    Target("decoding with softmax", ReadShare(Spec(name="softmax"), 65536), "at least", 0.8),
    Target("high/low split [2205.13213]", HighLow("spatial reduction"), "at least", 1.4),
    Target("high/low split [2205.13213]", HighLow("local windows"), "at least", 1.6),
)
