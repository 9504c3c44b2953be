r"""Length-scaled softplus attention: softplus of cosines that grow with the visible count, then,
in LSSAR, a second stage that sharpens each row.

    LSSA     s_ij = ln D · ln n_i · cos(q_i, k_j)    a_i = softplus(s_i) / sum    o = a v
    LSSAR    z_ij = relu(n_i a_ij - O_i)^p           b_i = z_i / sum              o = b v

q: (B,H,N,D)  k: (B,H_k,M,D)  v: (B,H_v,M,E). n_i is the number of keys that row i may see. The mean
of n_i a_i over a row is 1, so O_i = 1 removes every weight below average; rows of up to three keys
have O_i = 0. p = 15. A call's scale stands in for ln D.

Differs from the published code, unless `eps` is given: z is divided by its row's maximum before the
power, so that rows of small spread still sum to one, and a row of equal weights keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Golden, Limit, Paper
from regard.core.errors import ArgumentError
from regard.core.mask import Causal
from regard.core.scored import attend, without_padding
from regard.core.weights import Normaliser, Scored

_SHORT = 3  # rows of up to that many keys are not thinned out


@dataclass(frozen=True)
class LengthScaledSoftplus:
    """softplus(s_ij ln n_i), divided by its row sum; eps: added to the sum, None = nothing."""

    eps: float | None = None
    kind: Literal["two_pass"] = "two_pass"

    def __call__(self, scores: Tensor, visible: Tensor, count: Tensor) -> Tensor:
        return self.wide(scores, visible, count).to(scores.dtype)

    def wide(self, scores: Tensor, visible: Tensor, count: Tensor) -> Tensor:
        """The weights in float32 or better."""
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        growth = count.clamp_min(1).to(scores.dtype).log()
        return _shares(F.softplus(scores * growth).masked_fill(~visible, 0.0), self.eps)


@dataclass(frozen=True)
class Reweighted:
    """relu(n_i a_i - offset)^power of the first stage's weights a, divided by its row sum."""

    power: float = 15.0
    offset: float = 1.0
    eps: float | None = None
    kind: Literal["two_pass"] = "two_pass"

    def __call__(self, scores: Tensor, visible: Tensor, count: Tensor) -> Tensor:
        first = LengthScaledSoftplus(self.eps).wide(scores, visible, count)
        if first.shape[-1] == 0:
            return first.to(scores.dtype)
        excess = torch.relu(
            first * count.to(first.dtype) - self.offset * (count > _SHORT).to(first.dtype)
        )
        if self.eps is not None:
            return _shares(excess**self.power, self.eps).to(scores.dtype)
        peak = excess.amax(-1, keepdim=True).detach()  # a row's factor, which the sum takes out
        flat = peak <= 16 * torch.finfo(peak.dtype).eps
        sharp = _shares((excess / peak.masked_fill(flat, 1.0)) ** self.power, None)
        return torch.where(flat, first, sharp).to(scores.dtype)


def _shares(weights: Tensor, eps: float | None) -> Tensor:
    total = weights.sum(-1, keepdim=True)
    return weights / (total.masked_fill(total == 0, 1.0) if eps is None else total + eps)


def lssa(q: Tensor, k: Tensor, v: Tensor, call: Call, *, eps: float | None = None) -> Result:
    """The first stage alone. eps: the published stabiliser, added to row sums (1e-8)."""
    return _of_cosines(q, k, v, call, LengthScaledSoftplus(eps))


def lssar(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    power: float = 15.0,
    offset: float = 1.0,
    eps: float | None = None,
) -> Result:
    """Both stages. power: p, at least 1; offset: O; eps: the published stabiliser (1e-8), which
    leaves rows of small spread with a sum far below one.
    """
    if power < 1:
        raise ArgumentError("power", "at least 1", power)
    return _of_cosines(q, k, v, call, Reweighted(power, offset, eps))


def _of_cosines(q: Tensor, k: Tensor, v: Tensor, call: Call, rule: Normaliser) -> Result:
    check_qkv(q, k, v, call)
    q, k, v = without_padding(q, k, v, call)
    tiny = torch.finfo(q.dtype).eps
    q, k = F.normalize(q, dim=-1, eps=tiny), F.normalize(k, dim=-1, eps=tiny)
    return attend(q, k, v, call, Scored(normalise=rule, scale=math.log(q.shape[-1])))


def _replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    q, k, v = (case["inputs"][name] for name in "qkv")
    eps, power = case["config"]["eps"], case["config"]["p"]
    call = Call(mask=Causal())
    sight = torch.eye(k.shape[2], dtype=k.dtype).expand(k.shape[0], 1, -1, -1)
    return {
        "lssa": lssa(q, k, v, call, eps=eps).output,
        "lssa_weights": lssa(q, k, sight, call, eps=eps).output,
        "lssar": lssar(q, k, v, call, power=power, eps=eps).output,
        "lssar_weights": lssar(q, k, sight, call, power=power, eps=eps).output,
    }


_PAPER = Paper(
    "2501.13428",
    "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models",
    2025,
)
_GOLDEN = Golden(
    "134_lssa_lssar.pt",
    _replay,
    "On-Point-RND/transformer-architecture-generalization: models/lssa.py, models/lssar.py",
    "6d3fc68",
)

LSSA_CARD = Card(
    name="lssa",
    kind="operator",
    build=lssa,
    papers=(_PAPER,),
    family="scored",
    patterns=("noncausal self", "causal self", "noncausal cross", "causal cross"),
    grids=(1, 2, 3),
    cost=Cost(time=2, state="keys"),
    claim=Claim(
        "recalls as softmax does, with scores that the norms of q and k cannot blow up",
        "regard compare --task recall --mechanisms softmax,lssa,lssar",
    ),
    goldens=(_GOLDEN,),
)

LSSAR_CARD = Card(
    name="lssar",
    kind="operator",
    build=lssar,
    papers=(_PAPER,),
    family="scored",
    patterns=LSSA_CARD.patterns,
    grids=(1, 2, 3),
    cost=Cost(time=2, state="keys"),
    claim=Claim(
        "recalls as softmax does, with rows that stay sharp however many keys there are",
        "regard compare --task recall --mechanisms softmax,lssa,lssar",
    ),
    limits=(Limit({"power": 1.0, "offset": 0.0}, "lssa"),),
    goldens=(_GOLDEN,),
    deviations=("a stable power by default; `eps` gives the published one",),
)
