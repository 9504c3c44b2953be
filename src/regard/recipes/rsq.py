r"""RSQ: rotate, scale, then quantise, with the tokens that others attend to counting for more.

    R_j = sum_h sum_i A_hij        r_j = low + (high - low) (R_j - min R) / (max R - min R)
    H = 2/n sum_sequences sum_t r_t x_t x_t^T, r of mean 1        W <- GPTQ(W, H)

The residual stream is rotated (recipes/rotation.py), tokens get their weights in every layer
(importance/token_weights.py), and block after block, each reading what the rounded ones before it
give, the linear maps are rounded (recipes/gptq.py). The weights become values of a grid of 2^bits
per row, kept as floating-point numbers: packing them is left to whoever stores them.

Differs from the paper: attention is that of the model before any weight is rounded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regard.core.card import Claim, Golden, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.linears import blocks_of, weight_of
from regard.core.recipe import RecipeCard
from regard.importance.token_weights import rescaled
from regard.recipes.gptq import Curvature, Grid, gptq
from regard.recipes.rotation import rotated
from regard.recipes.token_importance import KINDS, Ends, Importance, received_by, token_importance
from regard.recipes.training import frozen
from regard.recipes.walking import Walk, curvature_of

Batch = Mapping[str, Tensor]


@torch.no_grad()
def rsq(
    model: Any,
    batches: Sequence[Batch],
    *,
    bits: int = 3,
    importance: Importance | Ends = "attention",
    low: float = 0.005,
    high: float = 1.0,
    symmetric: bool = True,
    clip: bool = True,
    rotate: bool = True,
    seed: int = 0,
) -> Any:
    """A copy of a model with the linear maps of its blocks quantised. batches: keyword arguments of
    a forward, to calibrate on.

    Raises:
        ArgumentError: numbers out of range, or no batch.
        UnsupportedError: blocks of unknown parts, or norms that do not commute with a rotation.
    """
    if not isinstance(importance, Ends) and importance not in KINDS:
        raise ArgumentError("importance", f"one of {', '.join(KINDS)}", importance)
    if not batches:
        raise ArgumentError("batches", "one or more", 0)
    made = rotated(model, seed) if rotate else copy.deepcopy(model)
    blocks = blocks_of(made)
    if not all(one.heads for one in blocks):
        raise UnsupportedError("rsq", f"{type(model).__name__} projects its heads together")
    with frozen(made):
        walks = [Walk.of(made, blocks, batch) for batch in batches]
        received = [
            received_by(made, batch) if importance == "attention" else {} for batch in batches
        ]
        for one in blocks:
            for walk, batch, mass in zip(walks, batches, received, strict=True):
                found = token_importance(importance, walk, one, batch, mass)
                walk.weights = rescaled(found, low, high)
            for stage in (one.heads, (one.joined,), one.units, (one.back,)):
                curvature = curvature_of(one, stage[0], walks)
                for module in stage:
                    weight = weight_of(module)
                    grid = Grid.of(weight, bits, symmetric=symmetric, clip=clip)
                    weight.copy_(gptq(weight, curvature, grid))
            for walk in walks:
                walk.state = walk.through(one)
    return made


def replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' H after one sequence, and after another with turned weights."""
    maps, config, x = case["inputs"]["attn"], case["config"], case["inputs"]["X"]
    weights = rescaled(maps.double().sum((0, 1, 2)), config["min_value"], config["max_value"])
    curvature, found = Curvature(x.shape[1]), {}
    for name, given, weight in (
        ("H_after_1", x, weights),
        ("H_after_2", 2 * x, weights.flip(0)),
    ):
        curvature.add(given[None], weight[None])
        found[name] = curvature.matrix.float()
    return found


CARD = RecipeCard(
    name="rsq",
    build=rsq,
    papers=(
        Paper(
            "2503.01820", "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs", 2025
        ),
    ),
    claim=Claim(
        "in three bits, weights whose errors make up for one another lose less than half of what"
        " the nearest values lose",
        "regard study few_bits",
    ),
    goldens=(
        Golden(
            "178_rsq.pt",
            replay,
            "https://github.com/ylsung/rsq",
            "1a7cf31d09",
            leaves={
                "raw": "reproduced by the probe concentration",
                "weights": "reproduced by the probe concentration",
            },
        ),
    ),
)
