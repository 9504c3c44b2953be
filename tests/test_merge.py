"""Partial results over disjoint keys merge exactly, in any split and any order."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.core.call import Call, Result
from regard.core.errors import ArgumentError
from regard.core.mask import Causal
from regard.core.merge import merge
from regard.core.scored import attend
from regard.core.weights import Scored
from regard.testing.compare import close


def part(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor) -> Result:
    call = Call(mask=Causal(), query_positions=torch.arange(q.shape[2]), key_positions=keys)
    return attend(q, k[:, :, keys], v[:, :, keys], call, Scored(), need_lse=True)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 20), max_size=4), seed=st.integers(0, 99))
def test_any_split_merges_to_the_whole(cuts: list[int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, 20, 4, generator=draw, dtype=torch.float64) for _ in range(3))
    order = torch.randperm(20, generator=draw)
    edges = [0, *sorted(cuts), 20]
    parts = [part(q, k, v, order[a:b]) for a, b in pairwise(edges)]
    whole = part(q, k, v, torch.arange(20))
    merged, nested = merge(parts), parts[-1]
    for other in reversed(parts[:-1]):
        nested = merge([nested, other])
    for found in (merged, nested):
        close(found.output, whole.output, "output", 1e-12)
        assert whole.lse is not None
        assert found.lse is not None
        close(found.lse, whole.lse, "log-sum-exp", 1e-12)


def test_a_row_empty_in_every_part_stays_zero_with_finite_gradients() -> None:
    q = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 1, 2, 4, dtype=torch.float64)
    later = torch.tensor([1, 2])
    call = Call(mask=Causal(), query_positions=torch.arange(3), key_positions=later)
    one = attend(q, k, k, call, Scored(), need_lse=True)
    merged = merge([one, one])
    assert not merged.output[:, :, 0].any()
    merged.output.sum().backward()
    assert q.grad is not None
    assert torch.isfinite(q.grad).all()


def test_parts_without_lse_are_refused() -> None:
    x = torch.randn(1, 1, 3, 4)
    with pytest.raises(ArgumentError, match="lse"):
        merge([attend(x, x, x, Call(), Scored())])
    with pytest.raises(ArgumentError, match="at least one"):
        merge([])
