"""The weights of some of a call's queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from regard.core.cutting import picked
from regard.core.model_scores import finished
from regard.core.moment import Moment
from regard.core.weights import Softmax, group_scores, repeat_heads


def weights_of_rows(at: Moment, rows: Tensor) -> Tensor:
    """The model's own weights (B,h,r,M) of the queries at indices rows (B,r)."""
    size = len(at.q)
    bias = None if at.bias is None else picked(at.bias, rows, size)
    scores = finished(group_scores(picked(at.q, rows, size), at.k) * at.scale, at.softcap, bias)
    seen = picked(at.seen(), rows, size)
    return Softmax()(scores, seen, seen.sum(-1, keepdim=True))


def spread_rows(real: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """Indices (B,r) of `count` real queries of each sequence, evenly spread and the last among
    them, and which of them there are (B,r): a sequence may be shorter. real (B,N); None: all.
    """
    length = real.sum(-1, keepdim=True)
    most = real.shape[1] if count is None else min(count, real.shape[1])
    number = torch.arange(most, device=real.device)
    taken = length.clamp_max(most)
    rank = ((number + 1) * length).div(taken.clamp_min(1), rounding_mode="floor") - 1
    order = (~real).to(torch.uint8).argsort(dim=-1, stable=True)
    there = number < taken
    return order.gather(1, rank.clamp(0, real.shape[1] - 1)), there


def rows_that(at: Moment, which: Literal["last", "every"]) -> Tensor:
    """Which queries (B,N) are meant: the last real one of each sequence, or every real one."""
    if which == "every":
        return at.query_real
    return at.query_real & (at.query_positions == at.length[:, None] - 1)


def keys_at(at: Moment, positions: Sequence[int]) -> Tensor:
    """Which keys (B,h,M) stand at these numbers of real tokens."""
    wanted = torch.tensor(positions, device=at.k.device)
    there = at.real & torch.isin(at.key_positions, wanted)
    return repeat_heads(there, at.q.shape[1])
