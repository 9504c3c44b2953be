"""The tiled executor against the dense truth, gradients included, over random calls."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard.build import create
from regard.core.call import Call
from regard.core.errors import UnsupportedError
from regard.core.mask import Causal, Given, Mask
from regard.core.scored import attend, decide, explain
from regard.core.tiling import plan_tiles, width
from regard.core.weights import Scored
from regard.masks.document import Document
from regard.masks.sinks import Sinks
from regard.masks.window import Window
from regard.testing.compare import close

MASKS: dict[str, Mask | None] = {
    "none": None,
    "causal": Causal(),
    "window": Causal() & Window(70),
    "sinks": Causal() & Window(40) | Sinks(5),
    "not window": ~Window(9),
    "per head": Given(lambda b, h, q, k: (q + k * (h + 1)) % 3 != 0),
    "nobody": Given(lambda b, h, q, k: (q < 0) & (k < 0)),
}


def with_gradients(impl: str, leaves: list[Tensor], call: Call, **fields: object) -> list[Tensor]:
    q, k, v, bias = (x.clone().requires_grad_() for x in leaves)
    method = Scored(key_bias=bias, **fields)  # type: ignore[arg-type]
    result = attend(q, k, v, call, method, impl=impl, need_lse=True)  # type: ignore[arg-type]
    assert result.lse is not None
    finite = result.lse.masked_fill(torch.isneginf(result.lse), 0.0)
    (result.output.sin().sum() + (finite * 0.3).sin().sum()).backward()
    return [result.output, finite, *(x.grad for x in (q, k, v, bias) if x.grad is not None)]


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 300),
    m=st.integers(1, 300),
    mask=st.sampled_from(sorted(MASKS)),
    groups=st.sampled_from([1, 2, 4]),
    padded=st.booleans(),
)
def test_tiled_equals_dense(n: int, m: int, mask: str, groups: int, padded: bool) -> None:
    draw = torch.Generator().manual_seed(n * 1000 + m)
    shape = {"generator": draw, "dtype": torch.float64}
    leaves = [
        torch.randn(2, 4, n, 6, **shape),
        torch.randn(2, 4 // groups, m, 6, **shape),
        torch.randn(2, 4 // groups, m, 5, **shape),
        torch.randn(2, 4, m, **shape),
    ]
    padding = torch.rand(2, m, generator=draw) > 0.2 if padded else None
    call = Call(mask=MASKS[mask], padding=padding)
    for got, expected in zip(
        with_gradients("tiled", leaves, call), with_gradients("dense", leaves, call), strict=True
    ):
        close(got, expected, mask, 1e-9)


def test_documents() -> None:
    ids = torch.arange(300).div(37, rounding_mode="floor").expand(2, -1)
    x = torch.randn(2, 2, 300, 8, dtype=torch.float64)
    call = Call(mask=Causal() & Document(ids, ids))
    tiled, dense = (attend(x, x, x, call, Scored(), impl=i).output for i in ("tiled", "dense"))
    close(tiled, dense, "documents", 1e-10)


def test_a_window_visits_few_blocks() -> None:
    x = torch.zeros(1, 1, 4096, 1)
    tiles = plan_tiles(Call(mask=Causal()).frame(x, x), Causal() & Window(256))
    assert max(width(t) for t in tiles) <= 384


def test_hidden_gradients_are_refused() -> None:
    x = torch.randn(1, 1, 4, 2)
    slope = torch.ones(1, requires_grad=True)
    method = Scored(score=lambda s, b, h, q, k: s * slope)
    with pytest.raises(UnsupportedError, match="captures"):
        attend(x, x, x, Call(), method, impl="tiled")
    listed = Scored(score=method.score, captures=(slope,))
    attend(x, x, x, Call(), listed, impl="tiled").output.sum().backward()
    assert slope.grad is not None
    got = slope.grad.clone()
    slope.grad = None
    attend(x, x, x, Call(), method, impl="dense").output.sum().backward()
    close(got, slope.grad, "gradient of a captured tensor", 1e-5)


@pytest.mark.parametrize(
    ("n", "mask", "impl"),
    [(64, None, "sdpa"), (64, Window(3), "sdpa"), (2048, Window(3), "tiled"), (2048, None, "sdpa")],
)
def test_auto_says_why(n: int, mask: Mask | None, impl: str) -> None:
    x = torch.zeros(1, 1, n, 4)
    found = decide(x, x, Call(mask=mask), Scored())
    assert found.impl == impl
    assert found.reason


def test_explain_lists_the_choices_of_a_layer() -> None:
    layer = create("sliding_window", dim=16, heads=2, window=8)
    found = explain(lambda call: layer(torch.zeros(1, 600, 16), call), Call(mask=Causal()))
    assert [choice.impl for choice in found] == ["tiled"]
    asked = create("sliding_window", dim=16, heads=2, window=8, impl="dense")
    found = explain(lambda call: asked(torch.zeros(1, 600, 16), call), Call(mask=Causal()))
    assert found == [("dense", "asked for")]
