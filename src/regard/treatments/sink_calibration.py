r"""Sink calibration: weight that flows into attention sinks beyond the first token goes back to the
other keys of its row, in proportion.

    r_k = 1/n_k sum_{i sees k} A_ik                     n_k: queries that see k
    S = {k > 0: r_k > t and n_k >= margin}              t = threshold, or alpha / length
    A'_ik = beta A_ik (k in S),  A_ik (1 + (1 - beta) sum_S A_i / sum_not S A_i) otherwise

Rows keep their sum. S is found in the prompt, per head, and kept while decoding; the last keys,
seen by fewer than `margin` queries, are never judged, since one query's weight is no mean. A row
whose weight lies on S alone stays as it is.

With `published=True` every call judges by itself, as the authors' code does: the first sink is
spared by its order, not because it is the first token; every column is judged; the first row of a
call divides by the sum over S too and then puts weight one on the first key, so that in decoding,
where it is the only row, its sum is no longer one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.card import Claim, Golden, Paper
from regard.core.cutting import moment_of
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.incoming import Memory, bare
from regard.core.maps import treated_maps
from regard.core.moment import Moment
from regard.core.treatment import Coincides, Treatment, TreatmentCard, Trial
from regard.core.weights import repeat_heads
from regard.importance.received import received


@dataclass(frozen=True)
class SinkCalibration(Treatment):
    """beta: what is left of a sink's weight, in [0, 1]; 1 changes nothing. alpha: a key is a sink
    if it gets more than alpha times the average weight; threshold: or more than this. margin: least
    number of queries that judge a key. published: see above.
    """

    beta: float = 0.4
    alpha: float = 5.0
    threshold: float | None = None
    margin: int = 8
    published: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ArgumentError("beta", "a fraction in [0, 1]", self.beta)
        if self.alpha <= 0 or (self.threshold is not None and self.threshold <= 0):
            raise ArgumentError("alpha, threshold", "numbers above 0", self)
        if self.margin < 1:
            raise ArgumentError("margin", "at least 1", self.margin)

    @property
    def neutral(self) -> bool:
        return self.beta == 1.0 and not self.published

    def weights(self, weights: Tensor, at: Moment) -> Tensor:
        if self.published:
            heavy = self.heavy(weights, at)
            spared = heavy & (heavy.cumsum(-1) > 1)
            rest = weights.masked_fill(spared[:, :, None], 0.0)
            rest[:, :, :1] = weights[:, :, :1]
            changed = moved(weights, rest, spared, self.beta)
            changed[:, :, 0, 0] = 1.0
            return changed
        sinks = self._found(weights, at) if at.phase == "prefill" else _remembered(at)
        rest = weights.masked_fill(sinks[:, :, None], 0.0)
        return moved(weights, rest, sinks, self.beta)

    def heavy(self, weights: Tensor, at: Moment) -> Tensor:
        """Keys that get more than their share, the first included, (B,h,M)."""
        mean, judges = received(weights, at.seen(), at.query_real)
        limit = self.alpha / at.length[:, None, None] if self.threshold is None else self.threshold
        return (mean > limit) & (judges >= (1 if self.published else self.margin))

    def _found(self, weights: Tensor, at: Moment) -> Tensor:
        """The prompt's sinks (B,h,M), remembered by position for all heads, (B,H,T)."""
        positions, real = (repeat_heads(x, len(at.heads)) for x in (at.key_positions, at.real))
        sinks = self.heavy(weights, at) & real & (positions > 0)
        table = at.memory.get("sinks")
        if table is None:
            table = sinks.new_zeros(len(sinks), at.site.heads, sinks.shape[-1])
        own = torch.zeros_like(sinks, dtype=torch.long).scatter_add(2, positions, sinks.long())
        at.memory["sinks"] = table.index_copy(1, torch.tensor(at.heads).to(own.device), own > 0)
        return sinks


def _remembered(at: Moment) -> Tensor:
    """Which of the keys at hand were sinks of the prompt, (B,h,M)."""
    table = at.memory.get("sinks")
    if table is None:
        raise UnsupportedError(
            "sink_calibration", "its sinks are found in the prompt: act there too"
        )
    positions = repeat_heads(at.key_positions, len(at.heads))
    real = repeat_heads(at.real, len(at.heads))
    last = table.shape[-1] - 1
    found = table[:, list(at.heads)].gather(2, positions.clamp_max(last))
    return found & real & (positions <= last)


def moved(weights: Tensor, rest: Tensor, sinks: Tensor, beta: float) -> Tensor:
    """Weights (B,h,N,M) with 1 - beta of what lies on sinks (B,h,M) dealt out in proportion to
    `rest`; a row without a rest stays.
    """
    marked = sinks[:, :, None]
    freed = (1 - beta) * weights.masked_fill(~marked, 0.0).sum(-1, keepdim=True)
    total = rest.sum(-1, keepdim=True)
    shares = rest / total.clamp_min(torch.finfo(rest.dtype).tiny)
    return torch.where(
        total > 0,
        torch.where(marked, beta * weights, weights) + freed * shares,
        weights,
    )


def replay(case: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' calibrated map of one golden case, and every column above their threshold: of
    the three maps that each case holds, its own setting's.
    """
    config, number = case["config"], setting(case)
    maps = case["inputs"][f"A{number}"]
    method = SinkCalibration(config["beta"], threshold=config["thres"], published=True)
    heads, nothing = tuple(range(maps.shape[1])), maps[..., :1]
    at = moment_of(bare(nothing, nothing, nothing), heads, None, Memory(), None)
    return {
        f"A_cal{number}": treated_maps(maps, method),
        f"sinks{number}": [x.nonzero()[:, 0] for x in method.heavy(maps, at)[0]],
    }


def setting(case: Mapping[str, Any]) -> int:
    """Which of the file's settings a case has: the paper's, another threshold, no weight left."""
    if case["config"]["beta"] == 0:
        return 2
    return 0 if case["config"]["thres"] == 0.1 else 1


CARD = TreatmentCard(
    name="sink_calibration",
    build=SinkCalibration,
    papers=(
        Paper(
            "2406.15765",
            "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models "
            "without Training through Attention Calibration",
            2024,
        ),
    ),
    claim=Claim(
        "sinks in the middle of a text give their weight back to its content",
        "regard evaluate --plan sink_calibration.json --task needle,perplexity",
    ),
    example=Trial({"threshold": 0.1}),
    neutral={"beta": 1.0},
    limits=(Coincides({"threshold": 2.0}),),
    goldens=tuple(
        Golden(
            "35_act_calibration.pt",
            replay,
            "https://github.com/GATECH-EIC/ACT",
            "a267af7",
            leaves={
                f"{name}{i}": "of another case's setting"
                for name in ("A_cal", "sinks")
                for i in range(3)
                if i != number
            },
            only=lambda case, number=number: setting(case) == number,
        )
        for number in range(3)
    ),
    gaps={"decoding": "sinks are found in the prompt, and one forward is one prompt"},
)
