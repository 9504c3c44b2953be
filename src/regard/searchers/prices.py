"""What rules cost, in the unit of a budget, as a part of what the untouched model costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from regard.core.errors import ArgumentError
from regard.core.moment import Site
from regard.searchers.rules import Group, Rule, Unit

Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Prices:
    """costs (P,G,C): of every rule of every group, at every length. fixed (P,): what is spent
    whatever the rules, such as feed-forward layers. All in parts of the untouched model's cost.
    """

    costs: Numbers
    fixed: Numbers

    def total(self, choice: NDArray[np.int64]) -> Numbers:
        """The whole cost (P,) of a choice (G,)."""
        return self.costs[:, np.arange(len(choice)), choice].sum(1) + self.fixed

    def room(self, budget: float) -> Numbers:
        """What a budget leaves for the groups (P,).

        Raises:
            ArgumentError: less than the cheapest rules cost, with the smallest budget that can be
                met.
        """
        if not self.reaches(budget) or budget > 1:
            least = math.ceil(1e4 * self.least) / 1e4  # rounded up, so that it can be met
            span = f"a part of {least:.4f} to 1 of the whole"
            raise ArgumentError("budget", span if least < 1 else "1: no rule costs less", budget)
        return budget - self.fixed

    @property
    def least(self) -> float:
        """The smallest budget that can be met at every length."""
        return float((self.costs.min(2).sum(1) + self.fixed).max())

    def reaches(self, budget: float) -> bool:
        """Whether the cheapest rules stay within a budget."""
        return self.least <= budget * (1 + 1e-9)


def kept(groups: Sequence[Group], rules: Sequence[Rule], lengths: Sequence[int]) -> Numbers:
    """Tokens (P,G,C) that every rule keeps."""
    tokens = np.array([[rule.kept(n) for rule in rules] for n in lengths], dtype=np.float64)
    return np.repeat(tokens[:, None], len(groups), 1)


def prices(
    model: Any,
    sites: Sequence[Site],
    groups: Sequence[Group],
    rules: Sequence[Rule],
    lengths: Sequence[int],
    unit: Unit,
    paces: Callable[[Rule | None, int], float] | None = None,
) -> Prices:
    """The prices of rules in a unit: bytes of the cache; tokens attended to; multiplications of one
    decoded token; seconds of one, where `paces(rule for all groups, length)` measures them.
    """
    tokens = kept(groups, rules, lengths)
    whole = np.array([float(n * len(groups)) for n in lengths])
    none = np.zeros(len(lengths))
    if unit in ("bytes", "tokens"):
        return Prices(tokens / whole[:, None, None], none)
    if unit == "flops":
        each, rest = _products(model, sites)
        every = each * whole + rest
        return Prices(each * tokens / every[:, None, None], rest / every)
    if paces is None:
        raise ArgumentError("unit", "a way to measure latency", unit)
    return _latency(tokens, whole, rules, lengths, paces)


def _products(model: Any, sites: Sequence[Site]) -> tuple[float, float]:
    """Multiplications per kept token of a group, and of all the rest of a decoded token."""
    shapes = {id(p): p for p in model.parameters() if p.ndim == 2}
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if embedding is not None and (head is None or head.weight is not embedding.weight):
        shapes.pop(id(embedding.weight), None)  # looked up, not multiplied
    width = sites[0].heads * _head_dim(model, sites[0])
    return 2.0 * width / sites[0].kv_heads, float(sum(p.numel() for p in shapes.values()))


def _head_dim(model: Any, site: Site) -> int:
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // site.heads


def _latency(
    tokens: Numbers,
    whole: Numbers,
    rules: Sequence[Rule],
    lengths: Sequence[int],
    paces: Callable[[Rule | None, int], float],
) -> Prices:
    """A line through two measurements: all groups dense, and all under the cheapest rule."""
    costs, fixed = np.zeros_like(tokens), np.zeros(len(lengths))
    for index, length in enumerate(lengths):
        cheapest = min(rules, key=lambda rule: rule.kept(length))
        dense, least = paces(None, length), paces(cheapest, length)
        spread = whole[index] * (1 - cheapest.kept(length) / length)
        slope = max(0.0, dense - least) / max(spread, 1.0)
        costs[index] = slope * tokens[index] / dense
        fixed[index] = 1 - slope * whole[index] / dense
    return Prices(costs, fixed)


def decoding_pace(model: Any, ids: torch.Tensor, steps: int = 16) -> float:
    """Median seconds of one decoded token after the prompt ids (B,N)."""
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        taken = []
        for _ in range(steps):
            began = time.perf_counter()
            model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
            taken.append(time.perf_counter() - began)
    return float(np.median(taken))
