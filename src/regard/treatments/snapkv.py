r"""SnapKV: after the prompt a head keeps the keys its last queries attend to most, and the newest.

    vote_j = sum_{i in window} A_ij,  j before the window        A: softmax weights, (w, M) per head
    keep   = top (c - w) of pool(vote)  and  the last w keys

w is the window of last queries, c the number of keys kept in all (`tokens`, or the fraction
`budget` of the prompt); pool averages (or maximises) over `kernel` neighbouring keys, counting the
zeros beyond the ends, as published. Query heads that share keys vote together, by their mean. The
prompt is judged once; what is generated afterwards is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.card import Claim, Golden, Paper
from regard.core.errors import ArgumentError
from regard.core.evicting import prompt_held
from regard.core.incoming import bare
from regard.core.moment import Held
from regard.core.treatment import Coincides, Treatment, TreatmentCard, Trial
from regard.core.weights import repeat_heads
from regard.importance.observed import observed_weights, ranked


@dataclass(frozen=True)
class SnapKV(Treatment):
    """budget: fraction of the prompt's keys to keep, or tokens: their number; exactly one. window:
    last queries that vote. kernel, pool: smoothing over neighbouring keys.
    """

    budget: float | None = None
    tokens: int | None = None
    window: int = 32
    kernel: int = 5
    pool: Literal["avg", "max"] = "avg"

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.tokens is None):
            raise ArgumentError("budget, tokens", "exactly one of the two", self)
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ArgumentError("budget", "a fraction in (0, 1]", self.budget)
        if self.window < 1 or (self.tokens is not None and self.tokens < self.window):
            raise ArgumentError("window", "at least 1 and at most `tokens`", self.window)
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ArgumentError("kernel", "an odd number", self.kernel)

    @property
    def neutral(self) -> bool:
        return self.budget == 1.0

    def keep(self, held: Held) -> Tensor | None:
        if held.phase != "prefill":
            return None
        length = held.length
        count = (length * (self.budget or 1.0)).long()
        if self.tokens is not None:
            count = count.clamp(self.tokens, self.tokens)
        recent = held.positions >= (length - self.window)[:, None, None]
        rest = (count - self.window).clamp_min(0)
        votes = self.votes(held).masked_fill(recent | ~held.real, -1.0)
        return recent | ranked(votes, rest)

    def votes(self, held: Held) -> Tensor:
        """What the window gives each key before it, (B,g,M), pooled over neighbouring keys."""
        recent = held.positions >= (held.length - self.window)[:, None, None]
        votes = observed_weights(held, self.window).sum(-2).masked_fill(recent, 0.0)
        pool = F.avg_pool1d if self.pool == "avg" else F.max_pool1d
        return pool(votes, self.kernel, stride=1, padding=self.kernel // 2)


def replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' kept keys of one golden case: the chosen ones by falling vote, then the
    window. They repeat keys for every query head before they choose.
    """
    config, inputs = case["config"], case["inputs"]
    q = inputs["q"]
    k, v = (repeat_heads(inputs[name], q.shape[1]) for name in ("k", "v"))
    method = SnapKV(
        tokens=config["max_capacity_prompt"],
        window=config["window_size"],
        kernel=config["kernel_size"],
        pool="avg" if config["pooling"] == "avgpool" else "max",
    )
    held = prompt_held(bare(q, k, v))
    if k.shape[2] < config["max_capacity_prompt"]:
        kept = held.positions
    else:
        before = k.shape[2] - method.window
        order = method.votes(held)[..., :before].argsort(dim=-1, descending=True, stable=True)
        top = order[..., : config["max_capacity_prompt"] - method.window]
        kept = torch.cat([top, held.positions[..., before:]], -1)
        stays = torch.zeros_like(held.real).scatter_(2, kept, True)
        kept_by_method = method.keep(held)
        if kept_by_method is None or not torch.equal(stays, kept_by_method):
            raise ArgumentError("keep", "the keys ranked first", "others")
    index = kept[..., None]
    return {
        "kept": kept,
        "keys": k.gather(2, index.expand(-1, -1, -1, k.shape[-1])),
        "values": v.gather(2, index.expand(-1, -1, -1, v.shape[-1])),
    }


CARD = TreatmentCard(
    name="snapkv",
    build=SnapKV,
    papers=(
        Paper("2404.14469", "SnapKV: LLM Knows What You are Looking for Before Generation", 2024),
    ),
    claim=Claim(
        "a quarter of the keys, chosen by the question, keeps retrieval intact",
        "regard evaluate --plan snapkv.json --task needle",
    ),
    example=Trial({"tokens": 10, "window": 4}),
    neutral={"budget": 1.0},
    limits=(Coincides({"tokens": 10_000}),),
    goldens=(
        Golden(
            "208_snapkv.pt",
            replay,
            "https://github.com/FasterDecoding/SnapKV",
            "e216ddc84c",
        ),
    ),
)
