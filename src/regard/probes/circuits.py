"""Circuits: the heads that matter to a task, and how much two tasks share of them."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from regard.core.errors import ArgumentError

Heads = frozenset[tuple[int, int]]
"""(layer, head) each."""


def in_circuit(scores: Tensor, share: float = 0.02) -> Heads:
    """The heads with the largest effects of either sign: a share of all, at least one. scores
    (L,H): NaN where a head was not measured.

    Raises:
        ArgumentError: no share in (0, 1], or no scores (L,H).
    """
    if scores.ndim != 2 or not scores.numel():
        raise ArgumentError("scores", "(layers, heads)", tuple(scores.shape))
    if not 0 < share <= 1:
        raise ArgumentError("share", "a fraction in (0, 1]", share)
    sizes = scores.abs().nan_to_num(-1.0).flatten()
    count = max(1, round(share * sizes.numel()))
    order = sizes.argsort(descending=True, stable=True)[:count].tolist()
    return frozenset(divmod(i, scores.shape[1]) for i in order if sizes[i] >= 0)


def circuit_overlap(a: Collection[tuple[int, int]], b: Collection[tuple[int, int]]) -> float:
    """Heads in both over heads in either.

    Raises:
        ArgumentError: neither has a head.
    """
    either = {*a, *b}
    if not either:
        raise ArgumentError("circuits", "one head or more", 0)
    return len({*a} & {*b}) / len(either)
