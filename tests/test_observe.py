"""Observed weights against the dense truth, and the memory they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regard.core.call import Call
from regard.core.errors import ArgumentError
from regard.core.mask import Causal, Given, Mask
from regard.core.observe import observe
from regard.core.scored import attend
from regard.core.weights import Normaliser, Scored, Softmax
from regard.masks.blocks import Blocks
from regard.masks.document import Document
from regard.masks.sinks import Sinks
from regard.masks.window import Window
from regard.operators.sigmoid import SigmoidWeights
from regard.scores.alibi import alibi
from regard.scores.relative import relative_bias
from regard.testing.compare import close


class OverTheMean:
    """A normaliser that must know a row before it can weigh a key of it."""

    kind = "two_pass"

    def __call__(self, scores: Tensor, visible: Tensor, count: Tensor) -> Tensor:
        seen = scores.masked_fill(~visible, 0.0)
        mean = seen.sum(-1, keepdim=True) / count.clamp_min(1)
        return (seen - mean).clamp_min(0.0).masked_fill(~visible, 0.0)


RULES: dict[str, Any] = {
    "online": Softmax(),
    "additive": SigmoidWeights(bias=None),
    "two_pass": OverTheMean(),
}


def masks_for(n: int, m: int) -> dict[str, Mask | None]:
    draw = torch.Generator().manual_seed(n * 100 + m)
    ids = torch.arange(max(n, m)).div(150, rounding_mode="floor").expand(2, -1)
    chart = torch.rand(1, 4, 8, 8, generator=draw) < 0.3
    return {
        "none": None,
        "causal": Causal(),
        "window and sinks": Causal() & Window(60) | Sinks(4),
        "not window": ~Window(9),
        "documents": Document(ids[:, -n:], ids[:, -m:]),
        "blocks": Blocks(chart, 64),
        "per head": Given(lambda b, h, q, k: (q + k * (h + 1)) % 3 != 0),
        "nobody": Given(lambda b, h, q, k: (q < 0) & (k < 0)),
    }


def gathered(q: Tensor, k: Tensor, call: Call, method: Scored, workspace: int) -> Tensor:
    """All that is observed, put in its place; no row may come twice."""
    found = q.new_zeros(*q.shape[:3], k.shape[2])
    times = torch.zeros(q.shape[:3], dtype=torch.long)
    for seen in observe(q, k, call, method, workspace=workspace):
        found[seen.batch, seen.heads, seen.rows, seen.keys] = seen.weights
        times[seen.batch, seen.heads, seen.rows] += 1
        assert seen.weights.nbytes <= workspace
    assert times.max() <= 1 if times.numel() else True
    return found


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 400),
    m=st.integers(1, 400),
    mask=st.sampled_from(sorted(masks_for(1, 1))),
    rule=st.sampled_from(sorted(RULES)),
    extra=st.sampled_from(["none", "key bias", "block bias", "score"]),
    groups=st.sampled_from([1, 2, 4]),
    padded=st.booleans(),
    rows=st.sampled_from([1, 7, 1000]),
)
def test_observed_equals_dense(
    n: int, m: int, mask: str, rule: str, extra: str, groups: int, padded: bool, rows: int
) -> None:
    draw = torch.Generator().manual_seed(n * 1000 + m)
    shape: dict[str, Any] = {"generator": draw, "dtype": torch.float64}
    q, k = torch.randn(2, 4, n, 6, **shape), torch.randn(2, 4 // groups, m, 6, **shape)
    bias = torch.randn(2, 4, m, **shape)
    padding = torch.rand(2, m, generator=draw) > 0.2 if padded else None
    real = torch.rand(2, n, generator=draw) > 0.2 if padded else None
    call = Call(mask=masks_for(n, m)[mask], padding=padding, query_padding=real)
    normalise: Normaliser = RULES[rule]
    method = {
        "none": Scored(normalise),
        "key bias": Scored(normalise, key_bias=bias),
        "block bias": Scored(
            normalise, block_bias=relative_bias(torch.randn(23, 6, **shape), 12, 0.3)
        ),
        "score": Scored(normalise, score=alibi(call.frame(q, k))),
    }[extra]
    every = torch.eye(m, dtype=torch.float64).expand(2, 4, -1, -1)
    with torch.no_grad():
        truth = attend(q, k, every, call, method, impl="dense").output
    found = gathered(q, k, call, method, 32 * m * rows)
    close(found, truth, f"{mask}, {rule}, {extra}", 1e-11)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in bytes; views count as what they show."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_hundred_thousand_keys_fit_the_workspace(rule: str) -> None:
    m, workspace = 100_000, 2**24
    q, k = torch.randn(1, 2, 12, 4), torch.randn(1, 1, m, 4)
    sums = torch.zeros(1, 2, 12)
    with Largest() as largest:
        for seen in observe(q, k, Call(mask=Causal()), Scored(RULES[rule]), workspace=workspace):
            sums[seen.batch, seen.heads, seen.rows] = seen.weights.sum(-1)
    assert largest.bytes <= workspace / 2
    assert (sums > 0).all()


def test_a_row_that_does_not_fit_is_refused() -> None:
    x = torch.zeros(1, 1, 64, 2)
    with pytest.raises(ArgumentError, match="workspace"):
        next(observe(x, x, Call(), Scored(), workspace=100))


def test_looking_leaves_no_trace() -> None:
    """No gradient is kept, and the caller's own setting survives between tiles."""
    x = torch.randn(1, 1, 300, 2, requires_grad=True)
    for seen in observe(x, x, Call(mask=Causal()), Scored()):
        assert torch.is_grad_enabled()
        assert not seen.weights.requires_grad
