r"""Non-approximate attention: a key's weight does not depend on who asks; each key has one logit.

    s_j = SiLU(q_j) . k_j s        o_i = sum_j e^{s_j} v_j / sum_j e^{s_j}, over j visible to i

q: (B,H,N,D)  k: (B,H_k,N,D)  v: (B,H_v,N,E); q and k come from the same tokens. s is 1/sqrt(D). The
map of weights is a column-constant matrix, so a running numerator and denominator serve instead of
the keys: with m_j the largest logit so far, they are a recurrence with key e^{s_j - m_j} and decay
e^{m_{j-1} - m_j}. The "dense" form weighs every pair and honours any mask.

The paper trains it with norms on q and k (it diverges without) and without rotary positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.recurrent import Form, Memory, Recurrent, is_causal, recur
from regard.core.scored import attend, without_padding
from regard.core.weights import Scored, repeat_heads, scale_of


@dataclass(frozen=True, eq=False)
class Running:
    """What decoding carries: numerator and denominator (B,H,1,E+1), and the largest logit (B,H)."""

    memory: Memory
    peak: Tensor


def column(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    state: Running | None = None,
    form: Form | Literal["dense"] = "auto",
) -> Result:
    """Attention by key logits alone; form "dense" or one of the recurrent forms, which take None or
    Causal() as mask and return their running sums as `Result.state`.

    Raises:
        UnsupportedError: queries that are not the keys' own tokens, seen by their number.
    """
    check_qkv(q, k, v, call)
    if q.shape[2] != k.shape[2]:
        raise UnsupportedError("non_approximate", "q must come from the tokens of k, one for one")
    call = call.of_self()
    q, k, v = without_padding(q, k, v, call)
    logits = (F.silu(q) * repeat_heads(k, q.shape[1])).sum(-1) * scale_of(call, None, q.shape[-1])
    call = call.but(scale=None)
    if form == "dense":
        if state is not None:
            raise ArgumentError("form", "a recurrent form to continue a state", form)
        return attend(torch.zeros_like(q), k, v, call, Scored(key_bias=logits))
    causal = is_causal(call, "non_approximate")
    if call.padding is not None:
        logits = logits.masked_fill(~call.padding[:, None], float("-inf"))
    peaks = _peaks(logits.detach(), None if state is None else state.peak, causal)
    before, peak = peaks[..., :-1], peaks[..., 1:]
    keys = (logits - peak.masked_fill(peak.isneginf(), 0.0)).exp()[..., None]
    decay = (before - peak).masked_fill(before.isneginf(), 0.0) if causal else None
    memory = None if state is None else state.memory
    rule = Recurrent(log_decay=decay, normalise=True)
    result = recur(torch.ones_like(q[..., :1]), keys, v, call, rule, state=memory, form=form)
    if result.state is None:
        return result
    return Result(result.output, state=Running(result.state, peaks[..., -1]))


def _peaks(logits: Tensor, start: Tensor | None, causal: bool) -> Tensor:
    """The largest logit before each token and after the last, (B,H,N) -> (B,H,N+1); without
    causality the largest of all, everywhere.
    """
    nothing = torch.full_like(logits[..., :0].sum(-1), float("-inf"))
    reached = torch.cat([(nothing if start is None else start)[..., None], logits], -1)
    if causal:
        return reached.cummax(-1).values
    return reached.amax(-1, keepdim=True).expand_as(reached)


NON_APPROXIMATE_CARD = Card(
    name="non_approximate",
    kind="operator",
    build=column,
    papers=(
        Paper(
            "2510.11602",
            "Deconstructing Attention: Investigating Design Principles for Effective "
            "Language Modeling",
            2025,
        ),
    ),
    family="recurrent",
    patterns=("noncausal self", "causal self"),
    grids=(1, 2, 3),
    cost=Cost(time=1, state="constant"),
    claim=Claim(
        "fails at recall, since its weights do not look at the query",
        "regard compare --task recall --mechanisms softmax,non_approximate",
    ),
    forms=("form", ("dense", "parallel", "chunk", "scan")),
)
