r"""Retrieval score: how much of an answer a head copies from where it stands.

    g_h = { j in needle : while some token x is generated, h attends most to j, and token j is x }
    score_h = |g_h| / |needle|        or, counting events, one 1/|needle| for every such step

The first is the paper's text (arXiv 2404.15574), the second its code: a token copied twice then
counts twice.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from regard.core.errors import ArgumentError

Count = Literal["set", "events"]


def retrieval_score(
    most: Tensor, prompt: Tensor, generated: Tensor, needle: Tensor, count: Count = "set"
) -> Tensor:
    """Scores (B,…) of heads.

    most (B,T,…): index of the key each head attends to most when it makes generated token t.
    prompt (B,N) and generated (B,T): ids. needle (B,N): True on the tokens that are the answer.

    Raises:
        ArgumentError: a row without a needle, or an unknown way to count.
    """
    length = needle.sum(-1)
    if not bool((length > 0).all()):
        raise ArgumentError("needle", "at least one token in every row", length.tolist())
    rows = torch.arange(len(prompt)).view(-1, *[1] * (most.ndim - 1))
    inside = most < prompt.shape[1]
    at = most.clamp_max(prompt.shape[1] - 1)
    made = generated.view(*generated.shape, *[1] * (most.ndim - 2))
    hit = inside & needle[rows, at] & (prompt[rows, at] == made)
    share = length.view(-1, *[1] * (most.ndim - 2)).to(torch.get_default_dtype())
    if count == "events":
        return hit.sum(1) / share
    if count != "set":
        raise ArgumentError("count", "'set' or 'events'", count)
    copied = torch.zeros(*most.shape[:1], prompt.shape[1], *most.shape[2:], dtype=torch.long)
    copied = copied.scatter_reduce(1, at, hit.long(), "amax")
    return copied.sum(1) / share
