"""The tiled executor against the dense truth, gradients included, over random calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard.build import create
from regard.core import tiled, unit
from regard.core.call import Call
from regard.core.errors import UnsupportedError
from regard.core.mask import Causal, Given, Mask
from regard.core.scored import attend, decide, explain
from regard.core.tiling import plan_tiles
from regard.core.weights import Scored
from regard.masks.blocks import Blocks
from regard.masks.document import Document
from regard.masks.sinks import Sinks
from regard.masks.window import Window
from regard.operators.sigmoid import SigmoidWeights
from regard.scores.relative import relative_bias
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


def random_blocks(n: int, m: int, size: int, draw: torch.Generator) -> Blocks:
    """A map of blocks for each of four heads, some of them alike."""
    shape = (1, 4, -(-n // size), -(-m // size))
    chart = torch.rand(shape, generator=draw) < 0.4
    chart[:, 2] = chart[:, 1]
    return Blocks(chart, size)


@contextmanager
def small_calls(block: int, call: int) -> Iterator[None]:
    """Tiles of few rows, few of them to a call, so that short inputs make many of both."""
    with mock.patch.object(unit, "BLOCK", block), mock.patch.object(tiled, "CALL", call):
        yield


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    m=st.integers(1, 70),
    batch=st.sampled_from([1, 2, 5]),
    mask=st.sampled_from([*sorted(MASKS), "documents", "blocks", "blocks or window"]),
    groups=st.sampled_from([1, 2, 4]),
    sort=st.sampled_from(["softmax", "lse", "bias", "block bias", "score", "sigmoid"]),
    call=st.sampled_from([1, 3000, 2**20]),
    strided=st.booleans(),
)
def test_stacks_equal_dense(
    n: int,
    m: int,
    batch: int,
    mask: str,
    groups: int,
    sort: str,
    call: int,
    strided: bool,
) -> None:
    draw = torch.Generator().manual_seed(n * 1000 + m)
    ids = torch.arange(max(n, m)).div(11, rounding_mode="floor").expand(batch, -1)
    masks = {
        **MASKS,
        "window": Causal() & Window(11),
        "documents": Document(ids[:, -n:], ids[:, -m:]),
        "blocks": random_blocks(max(n, m), m, 8, draw),
        "blocks or window": random_blocks(max(n, m), m, 5, draw) | Window(3),
    }
    kv = 4 // groups
    shapes = [(n, 4, 6), (m, kv, 6), (m, kv, 5), (m, 4, 1)]
    leaves = []
    for length, heads, width in shapes:
        x = torch.randn(batch, length, heads, width, generator=draw, dtype=torch.float64)
        leaves.append(x.transpose(1, 2) if strided else x.transpose(1, 2).contiguous())
    results = []
    for impl in ("tiled", "dense"):
        q, k, v, extra = (x.clone(memory_format=torch.preserve_format) for x in leaves)
        own = [x.requires_grad_() for x in (q, k, v, extra)]
        slope = torch.linspace(0.5, 1, 13, dtype=torch.float64).requires_grad_()
        method = scored_like(sort, extra[..., 0], slope)
        with small_calls(8, call):
            result = attend(
                q, k, v, Call(mask=masks[mask]), method, impl=impl, need_lse=sort == "lse"
            )
        total = result.output.sin().sum()
        if result.lse is not None:
            total = total + result.lse.masked_fill(torch.isneginf(result.lse), 0.0).sin().sum()
        found = torch.autograd.grad(total, [*own, slope], allow_unused=True)
        zeros = [torch.zeros_like(x) for x in (*own, slope)]
        results.append(
            [result.output, *(z if g is None else g for g, z in zip(found, zeros, strict=True))]
        )
    for got, expected in zip(*results, strict=True):
        close(got, expected, f"{mask}, {sort}", 1e-9)


def scored_like(sort: str, bias: Tensor, slope: Tensor) -> Scored:
    """A mechanism of each sort; slope (R,) is its parameter, where it has one."""
    if sort == "bias":
        return Scored(key_bias=bias)
    if sort == "block bias":
        table = slope[:, None].expand(-1, 6)
        return Scored(block_bias=relative_bias(table, 7, 0.3), captures=(slope,))
    if sort == "score":
        return Scored(
            score=lambda s, b, h, q, k: (s * slope[(q + k + h) % 13]).tanh(), captures=(slope,)
        )
    if sort == "sigmoid":
        return Scored(normalise=SigmoidWeights(bias=None))
    return Scored()


def test_one_call_computes_many_tiles() -> None:
    """What makes windows fast: inner tiles of all rows go to the kernel together, keys uncopied."""
    q, k, v = (torch.randn(1, 2, 4096, 4) for _ in range(3))
    calls = []
    whole = F.scaled_dot_product_attention

    def counted(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        calls.append((q.shape[0], k.untyped_storage().data_ptr()))
        return whole(q, k, v, **options)  # type: ignore[arg-type]

    with mock.patch.object(F, "scaled_dot_product_attention", counted):
        attend(q, k, v, Call(mask=Causal()), Scored(mask=Window(256)), impl="tiled")
    assert [tiles for tiles, _ in calls] == [30, 1, 1]
    assert {place for _, place in calls} == {k.untyped_storage().data_ptr()}


def test_a_bias_of_a_few_distances_is_a_band() -> None:
    """Only keys that the table reaches are given anything."""
    x = torch.zeros(1, 1, 512, 4)
    frame = Call().frame(x, x)
    bias = relative_bias(torch.ones(20, 4), 20, 1.0)
    first, values = bias(torch.ones(1, 1, 64, 4), frame.rows(256, 320))
    assert first == 256 - 19
    assert values.shape[-1] == 64 + 19


def test_a_window_visits_few_blocks() -> None:
    x = torch.zeros(1, 1, 4096, 1)
    tiles = plan_tiles(Call(mask=Causal()).frame(x, x), Causal() & Window(256))
    assert max(stack.width for stack in tiles) <= 384


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
