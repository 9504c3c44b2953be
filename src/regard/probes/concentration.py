r"""Concentration: on how few tokens the attention of a head, and of a layer, comes down.

    R_j = sum_i A_ij        top_share = sum of the largest ceil(top m) R_j / sum_j R_j
    coverage = exp(- sum_j p_j ln p_j) / m, p_j = R_j / sum_j R_j        m: real keys

token_top_share is the same for R summed over the heads of a layer, by which quantisation and
eviction rank tokens. Uniform full attention has top_share = top and coverage = 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.card import Claim, Golden, Paper
from regard.core.errors import ArgumentError
from regard.core.observe import Seen
from regard.core.probe import Finding, Look, ProbeCard, add_columns, plain_look, zeros
from regard.core.shown import tile
from regard.importance.token_weights import rescaled


@dataclass(frozen=True)
class Concentration:
    """top: fraction of the keys whose share is told."""

    top: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.top <= 1:
            raise ArgumentError("top", "a fraction in (0, 1]", self.top)

    def begin(self, look: Look) -> _Received:
        return _Received(self, look)


class _Received:
    def __init__(self, probe: Concentration, look: Look) -> None:
        self.probe, self.look = probe, look
        self.mass = zeros(look, look.keys.shape[1])

    def add(self, seen: Seen) -> None:
        add_columns(self.mass, seen, seen.mass)

    def found(self) -> Finding:
        keys = self.look.real_keys.sum(-1, keepdim=True)
        mass = self.mass.masked_fill(~self.look.real_keys[:, None], 0.0)
        spread = torch.special.entr(mass / mass.sum(-1, keepdim=True)).sum(-1).exp()
        return Finding(
            {"top_share": self.share(mass, keys), "coverage": spread / keys},
            layers={"token_top_share": self.share(mass.sum(1, keepdim=True), keys)[:, 0]},
        )

    def share(self, mass: Tensor, keys: Tensor) -> Tensor:
        """Share (B,H) of mass (B,H,M) that lies on the first of so many keys (B,1)."""
        count = (keys * self.probe.top).ceil()[..., None]
        rank = torch.arange(mass.shape[-1], device=mass.device)
        ordered = mass.sort(-1, descending=True).values
        return (ordered * (rank < count)).sum(-1) / mass.sum(-1)


def replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' importance of tokens, and its weights."""
    maps, config = case["inputs"]["attn"], case["config"]
    tally = Concentration().begin(plain_look(maps))
    tally.add(tile(maps))
    raw = tally.mass.sum((0, 1))
    weights = rescaled(raw, config["min_value"], config["max_value"])
    return {"raw": raw.float(), "weights": weights.float()}


QUANTISER = "the Hessian of a quantiser of weights; only the importance of tokens is a reading"

CARD = ProbeCard(
    name="concentration",
    build=Concentration,
    metrics={
        "top_share": "share of all weight on the most-read tenth (`top`) of the keys, 0 to 1",
        "coverage": "effective number of keys that are read, over their number, 0 to 1",
    },
    layers={"token_top_share": "top_share of the layer's heads taken together, 0 to 1"},
    papers=(
        Paper(
            "2503.01820", "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs", 2025
        ),
    ),
    claim=Claim("a few tokens receive most of the attention", "regard atlas"),
    goldens=(
        Golden(
            "178_rsq.pt",
            replay,
            "https://github.com/ylsung/rsq",
            "1a7cf31d09",
            leaves={"H_after_1": QUANTISER, "H_after_2": QUANTISER},
        ),
    ),
)
