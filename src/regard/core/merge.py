r"""Exact merging of partial results over disjoint sets of keys.

    lse = log sum_p exp(lse_p)        o = sum_p exp(lse_p - lse) o_p

Ring attention, split-KV decoding, sinks + window and local + pooled attention are all such merges.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regard.core.call import Result
from regard.core.errors import ArgumentError


def merge(parts: Sequence[Result]) -> Result:
    """Merge results (output (B,H,N,E), lse (B,H,N)) of the same queries over disjoint keys;
    associative, order-free.

    A row that is empty in every part stays zero, with lse = -inf.
    """
    if not parts:
        raise ArgumentError("parts", "at least one result", 0)
    stacked = torch.stack([part.row_lse for part in parts])
    empty = torch.isneginf(stacked).all(0)
    total = torch.logsumexp(stacked.masked_fill(empty, 0.0), 0)
    shares = torch.exp(stacked - total).masked_fill(empty, 0.0)
    output = sum(
        (s[..., None] * p.output for s, p in zip(shares, parts, strict=True)),
        torch.zeros_like(parts[0].output),
    )
    return Result(output, total.masked_fill(empty, float("-inf")))
