r"""Sigmoid schedule: the shares of tokens that layers keep, as a curve of two numbers.

    share(l) = least + (1 - least) / (1 + exp(k (l - l0)))        mean_l share(l) = budget

The steepness k and the middle l0 are free, `least` follows from the budget, and every trial meets
the budget exactly. They are tuned by Bayesian optimisation (optuna's tree-structured Parzen
estimator, seeded). What a score is, see `regard.searchers.token_schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.searcher import SearcherCard
from regard.searchers.token_schedule import TITLE, Remembered, Schedule, Score, Shares

STEEPNESS = (0.05, 8.0)
"""Bounds of k, per layer."""
LEAST = 1 / 128
"""No layer keeps a smaller share."""


def sigmoid_shares(layers: int, budget: float, steepness: float, middle: float) -> Shares:
    """The falling curve of a mean share, `budget`, that is 1 before its middle layer.

    Raises:
        ArgumentError: a budget outside (0, 1], or one that the curve exceeds even if later layers
            keep nothing.
    """
    if not 0 < budget <= 1 or layers < 1:
        raise ArgumentError("budget, layers", "in (0, 1], at least 1", (budget, layers))
    curve = _curve(layers, steepness, middle)
    mean = float(curve.mean())
    if mean > budget:
        raise ArgumentError("budget", f"at least {mean:.4g} for this curve", budget)
    least = (budget - mean) / (1 - mean) if mean < 1 else 1.0
    return tuple((least + (1 - least) * curve).tolist())


def tuned_schedule(
    score: Score,
    layers: int,
    budget: float,
    *,
    trials: int = 32,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
) -> Schedule:
    """The curve with the best score of some trials; the first is the same share in all layers, so
    that the curve found is never worse than that. Equal scores: the earlier trial.

    Raises:
        ArgumentError: a budget of LEAST or less, or above 1, or no trial.
        UnsupportedError: optuna is missing.
    """
    if not LEAST < budget <= 1 or trials < 1 or layers < 1:
        got = (budget, trials, layers)
        raise ArgumentError("budget, trials, layers", f"({LEAST}, 1], and at least 1", got)
    study, memory = _study(seed), Remembered(score)
    best = (budget,) * layers
    memory(best)
    for number in range(1, trials):
        if progress is not None:
            progress(number / trials, f"trial {number}")
        trial = study.ask()
        steepness = trial.suggest_float("steepness", *STEEPNESS, log=True)
        shares = _within(layers, budget, steepness, trial.suggest_float("middle", 0.0, 1.0))
        study.tell(trial, memory(shares))
        best = shares if memory(shares) > memory(best) else best
    if progress is not None:
        progress(1.0, "")
    return Schedule(best, memory(best), len(memory.known))


def _within(layers: int, budget: float, steepness: float, part: float) -> Shares:
    """A curve of this steepness and budget: its middle lies at a part of the way from where it is
    all but flat to the last place at which every layer still keeps LEAST.
    """
    room = (budget - LEAST) / (1 - LEAST)
    flat = min(-float(layers), -math.log(max(1 / room - 1, 1e-9)) / steepness)
    low, high = flat, 2.0 * layers
    for _ in range(60):
        middle = (low + high) / 2
        fits = float(_curve(layers, steepness, middle).mean()) <= room
        low, high = (middle, high) if fits else (low, middle)
    return sigmoid_shares(layers, budget, steepness, flat + part * (low - flat))


def _curve(layers: int, steepness: float, middle: float) -> NDArray[np.float64]:
    """1 / (1 + exp(k (l - l0))) of every layer."""
    return 0.5 * (1 - np.tanh(steepness * (np.arange(layers) - middle) / 2))


def _study(seed: int) -> Any:
    """A study of optuna that wants large values, made without a word."""
    try:
        optuna: Any = import_module("optuna")
    except ImportError as error:
        lacks = "optuna is missing (pip install 'regard[search]')"
        raise UnsupportedError("sigmoid_schedule", lacks) from error
    told = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sampler = optuna.samplers.TPESampler(seed=seed)
        return optuna.create_study(direction="maximize", sampler=sampler)
    finally:
        optuna.logging.set_verbosity(told)


CARD = SearcherCard(
    name="sigmoid_schedule",
    build=tuned_schedule,
    finds="plan",
    papers=(Paper("2412.00556", TITLE, 2024),),
    claim=Claim(
        "a falling curve of two numbers beats the same share in all layers",
        "regard study fewer_tokens_deeper",
    ),
)
