r"""Temperature: scores are divided by tau before softmax, the model's own position bias included.

    A = softmax((q k^T s + b) / tau)        tau < 1 sharpens, tau > 1 flattens

Each layer of softmax averages its tokens, more so in longer texts, so embeddings of long texts
draw together; one tau below 1 in every layer slows that. Without a bias and without soft-capped
scores this is q / tau, and the model's own kernel stays; a bias (T5, ALiBi) is divided with the
scores, as are scores that were soft-capped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.card import Claim, Golden, Paper
from regard.core.errors import ArgumentError
from regard.core.incoming import Chosen, Memory, bare
from regard.core.moment import Moment
from regard.core.treating import scores_of, treat
from regard.core.treatment import Coincides, Treatment, TreatmentCard, Trial


@dataclass(frozen=True)
class Temperature(Treatment):
    """tau: what scores are divided by, above 0; 1 changes nothing."""

    tau: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.tau < math.inf:
            raise ArgumentError("tau", "a number above 0", self.tau)

    @property
    def neutral(self) -> bool:
        return self.tau == 1.0

    def inputs(self, at: Moment) -> tuple[Tensor, Tensor, Tensor]:
        q = at.q / self.tau if at.softcap is None else at.q
        return q, at.k, at.v

    def bias(self, at: Moment) -> Tensor | None:
        """What turns the bias, or all of the capped scores, into itself divided by tau."""
        scores = at.bias if at.softcap is None else scores_of(at)
        if scores is None:
            return None
        return (scores / self.tau).clamp_min(torch.finfo(scores.dtype).min) - scores


def replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' BERT attention of one golden case; its additive mask is a bias."""
    config, weights, x = case["config"], case["state_dict"], case["inputs"]["x"]
    heads = config["heads"]

    def projected(name: str) -> Tensor:
        y = F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])
        return y.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B,H,N,D)

    q, k, v = (projected(name) for name in ("query", "key", "value"))
    step = Chosen(
        0,
        Temperature(config["temperature"]),
        tuple(range(heads)),
        frozenset({"prefill"}),
    )
    unit = torch.eye(k.shape[2], dtype=x.dtype).expand(*k.shape[:3], -1)
    context, probs = (
        treat(
            replace(bare(q, k, values, causal=False), bias=case["inputs"]["additive_mask"]),
            [step],
            Memory(),
        )
        for values in (v, unit)
    )
    return {"context": context.transpose(1, 2).flatten(2), "probs": probs}


CARD = TreatmentCard(
    name="temperature",
    build=Temperature,
    papers=(
        Paper(
            "2410.24200",
            "Length-Induced Embedding Collapse in Transformer-based Models",
            2024,
        ),
    ),
    claim=Claim(
        "a temperature below 1 keeps embeddings of long texts apart",
        "regard evaluate --plan temperature.json --task perplexity",
    ),
    example=Trial({"tau": 0.8}, model="encoder"),
    neutral={"tau": 1.0},
    limits=(Coincides({"tau": 1e15}, "uniform_heads"),),
    goldens=(
        Golden(
            "207_tempscale.pt",
            replay,
            "https://github.com/Yuqi-Zhou/Length_Collapse",
            "6943293",
        ),
    ),
)
