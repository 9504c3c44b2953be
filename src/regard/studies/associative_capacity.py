r"""Associative capacity of a head: linear attention as a memory that pairs stimuli, how many pairs
it holds, and what better rules of writing, depth and more heads change.

    S = sum_j k_j v_j^T        S^T k_j = v_j + sum_{l != j} (k_l . k_j) v_l        |k| = 1

k: conditional, v: unconditional stimuli, (n,D), uniform on the sphere; a head without normaliser
writes S and reads it. With random values the cross-talk has mean square (n-1)/D, so the cosine of
what is read with v_j is 1/sqrt(1 + (n-1)/D): on average D pairs are held. Values may also conspire:
reading is right for whatever values only while sum_l |k_l . k_j| < 1, which holds for about
sqrt(pi D / 2) pairs. The delta rule takes back what it already answers to a key. Reading through
L memories in a row multiplies cosines; averaging m heads divides the cross-talk by m.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.call import Call
from regard.core.card import Claim, Paper
from regard.core.delta import DeltaRule, delta
from regard.core.errors import ArgumentError
from regard.core.mask import Causal
from regard.core.recurrent import Memory, Recurrent, recur
from regard.core.study import Curve, Figure, Outcome, Progress, StudyCard

LOADS = (0.25, 0.5, 1.0, 2.0)
"""Pairs per dimension."""


def hebb(cues: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What memories (H) of keys (H,n,D) and values (H,n,E) answer to cues (H,m,D): (H,m,E)."""
    return recur(cues[None], keys[None], values[None], Call(), Recurrent()).output[0]


def cycled_delta(keys: Tensor, values: Tensor, passes: int) -> Tensor:
    """Answers (n,E) to keys (n,D) of length one after so many passes of the delta rule."""
    q, k, v = (x[None, None] for x in (keys, keys, values))
    rule = DeltaRule(torch.ones(1, 1, len(keys), dtype=keys.dtype))
    state: Memory | None = None
    for _ in range(passes):
        state = delta(q, k, v, Call(mask=Causal()), rule, state=state).state
    return keys @ state.content[0, 0] if state is not None else torch.zeros_like(values)


def cosine(read: Tensor, values: Tensor) -> float:
    """Mean cosine between rows."""
    return F.cosine_similarity(read, values, dim=-1).mean().item()


def recalled(read: Tensor, values: Tensor) -> float:
    """Share of rows of `read` (n,E) nearer to their own value (n,E) than to every other."""
    return ((read @ values.mT).argmax(-1) == torch.arange(len(values))).double().mean().item()


def capacities(keys: Tensor) -> tuple[int, int]:
    """Pairs that the first of these keys (n,D) hold: whatever the values, and on average (the
    cross-talk as strong as the signal).
    """
    products = keys @ keys.mT - torch.eye(len(keys), dtype=keys.dtype)
    worst = products.abs().cumsum(1)  # [j, n]: of key j with keys up to n
    worst = worst.masked_fill(torch.ones_like(worst).tril(-1).bool(), 0.0).amax(0)
    count = torch.arange(1, len(keys) + 1)
    energy = products.square().cumsum(0).cumsum(1).diagonal() / count
    return _before(worst >= 1), _before(energy >= 1)


def _before(failed: Tensor) -> int:
    """Entries before the first that failed."""
    return int((failed.cumsum(0) == 0).sum())


def slope(points: list[tuple[float, float]]) -> float:
    """Of the straight line through points, by least squares."""
    x, y = torch.tensor(points, dtype=torch.float64).unbind(1)
    x = x - x.mean()
    return ((x * y).sum() / x.square().sum()).item()


@dataclass(frozen=True)
class AssociativeCapacity:
    """dim: D of the memories; dims: widths over which capacity is followed; draws: of random keys,
    averaged; depth: L; heads: m; passes: of the delta rule.
    """

    dim: int = 64
    dims: tuple[int, ...] = (32, 64, 128, 256, 512)
    draws: int = 10
    depth: int = 3
    heads: int = 4
    passes: int = 60
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.dims) < 2 or min(self.dim // 4, *self.dims, self.draws, self.depth) < 1:
            raise ArgumentError("sizes", "at least 1, dim at least 4, two dims or more", self)

    def run(self, progress: Progress) -> Outcome:
        """Recall by load, capacity by width, then rules, depth and heads."""
        draw = torch.Generator().manual_seed(self.seed)
        loads = {load: self.fidelity(int(load * self.dim), draw) for load in LOADS}
        progress(0.2)
        worst, mean = [], []
        for step, dim in enumerate(self.dims):
            found = [capacities(sphere(draw, 2 * dim, dim)) for _ in range(self.draws)]
            for line, held in zip((worst, mean), zip(*found, strict=True), strict=True):
                line.append((math.log2(dim), math.log2(sum(held) / self.draws)))
            progress(0.2 + 0.6 * (step + 1) / len(self.dims))
        figures = (
            *self.recall_figures(loads),
            Figure("exponent, whatever the values", slope(worst), "O(sqrt D) pairs", 0.4, 0.6),
            Figure("exponent, on average", slope(mean), "O(D) pairs on average", 0.9, 1.1),
            *self.rule_figures(draw),
            *self.network_figures(draw),
        )
        progress(1.0)
        formula = {load: self.predicted(int(load * self.dim)) for load in LOADS}
        lines = {"measured": list(loads.items()), "1/sqrt(1+(n-1)/D)": list(formula.items())}
        held = {"whatever the values": worst, "on average": mean}
        return Outcome(
            figures,
            (
                Curve("What is read, by load", "pairs per dimension", "cosine with v", lines),
                Curve("Capacity by width", "log2 D", "log2 pairs", held),
            ),
        )

    def predicted(self, pairs: int) -> float:
        """Cosine that the cross-talk of random keys leaves."""
        return (1 + (pairs - 1) / self.dim) ** -0.5

    def fidelity(self, pairs: int, draw: torch.Generator) -> float:
        """Cosine that one head reads with, averaged over draws."""
        keys, values = (sphere(draw, self.draws, pairs, self.dim) for _ in range(2))
        return cosine(hebb(keys, keys, values), values)

    def recall_figures(self, loads: dict[float, float]) -> tuple[Figure, ...]:
        """Measured against predicted cosines."""
        return tuple(
            Figure(
                f"cosine, {int(load * self.dim)} pairs in {self.dim} dimensions",
                found,
                "cross-talk of variance (n-1)/D",
                self.predicted(int(load * self.dim)) - 0.02,
                self.predicted(int(load * self.dim)) + 0.02,
            )
            for load, found in loads.items()
        )

    def rule_figures(self, draw: torch.Generator) -> tuple[Figure, ...]:
        """Orthogonal keys, and the delta rule at half load."""
        random = torch.randn(self.dim, self.dim, generator=draw, dtype=torch.float64)
        values = sphere(draw, self.dim, self.dim)
        keys = torch.linalg.qr(random).Q
        exact = (hebb(keys[None], keys[None], values[None])[0] - values).abs().max().item()
        half = self.dim // 2
        keys, values = sphere(draw, half, self.dim), values[:half]
        once = cycled_delta(keys, values, 1)
        last = (once[-1] - values[-1]).abs().max().item()
        corrected = cosine(cycled_delta(keys, values, self.passes), values)
        return (
            Figure("error, D orthogonal keys", exact, "no cross-talk: exact", high=1e-9),
            Figure("delta rule: error of the last pair", last, "replaced exactly", high=1e-9),
            Figure(
                "delta rule, repeated: cosine at half load",
                corrected,
                "an error-correcting rule recalls all of n <= D pairs (Hebb: 0.82)",
                low=0.99,
            ),
        )

    def network_figures(self, draw: torch.Generator) -> tuple[Figure, ...]:
        """Memories in a row, with D pairs each, and heads side by side, with 8 D pairs."""
        chain = [sphere(draw, self.draws, self.dim, self.dim) for _ in range(self.depth + 1)]
        read = chain[0]
        for keys, values in pairwise(chain):
            read = hebb(read, keys, values)
        fidelity, expected = cosine(read, chain[-1]), self.predicted(self.dim) ** self.depth
        pairs = 8 * self.dim
        values = sphere(draw, pairs, self.dim)
        keys = sphere(draw, self.heads, pairs, self.dim)
        reads = hebb(keys, keys, values.expand(self.heads, -1, -1))
        alone = sum(recalled(read, values) for read in reads) / self.heads
        together = recalled(reads.mean(0), values)
        return (
            Figure(
                f"cosine through {self.depth} memories",
                fidelity,
                f"fidelity multiplies with depth: {expected:.3f}",
                expected - 0.05,
                expected + 0.05,
            ),
            Figure(
                f"pairs missed by {self.heads} heads / by one",
                (1 - together) / (1 - alone) if alone < 1 else math.nan,
                "redundant heads divide the failure rate",
                high=1 / self.heads,
            ),
        )


def sphere(draw: torch.Generator, *shape: int) -> Tensor:
    """Random rows of length one."""
    return F.normalize(torch.randn(*shape, generator=draw, dtype=torch.float64), dim=-1)


CARD = StudyCard(
    name="associative_capacity",
    build=AssociativeCapacity,
    papers=(
        Paper(
            "2508.08289",
            "Understanding Transformers through the Lens of Pavlovian Conditioning",
            2025,
        ),
    ),
    claim=Claim(
        "a head holds pairs in proportion to its width on average, but to the square root of it "
        "for whatever values",
        "regard study associative_capacity",
    ),
    seconds=1,
    small={"dim": 16, "dims": (8, 16), "draws": 2, "passes": 5},
)
