"""Decoding: the split executor against the dense truth, and who is served by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard.build import create
from regard.core.call import Call
from regard.core.decoding import SPAN, SPLIT_FROM, SPLIT_FROM_HALF, run_splits, spans_of
from regard.core.errors import UnsupportedError
from regard.core.frame import Pairs
from regard.core.mask import Causal, Given, Mask
from regard.core.rows import take_rows, value_sums
from regard.core.scored import Decision, attend, decide, explain
from regard.core.state import Keys, extended
from regard.core.weights import Normaliser, Scored, Softmax, repeat_heads
from regard.masks.sinks import Sinks
from regard.masks.window import Window
from regard.operators.lssa import Reweighted
from regard.operators.sigmoid import SigmoidWeights
from regard.operators.taylor import TaylorWeights
from regard.testing.compare import close, same

MASKS: dict[str, Mask | None] = {
    "none": None,
    "causal": Causal(),
    "window": Causal() & Window(70),
    "sinks": Causal() & Window(40) | Sinks(5),
    "per head": Given(lambda b, h, q, k: (q + k * (h + 1)) % 3 != 0),
    "nobody": Given(lambda b, h, q, k: (q < 0) & (k < 0)),
}
NORMALISERS: dict[str, Normaliser] = {
    "softmax": Softmax(),
    "sigmoid": SigmoidWeights(None),
    "taylor": TaylorWeights(),
    "reweighted": Reweighted(),
}
NAN = float("nan")


@st.composite
def scenes(draw: Any) -> dict[str, Any]:
    """A call of few queries and up to a few spans of keys."""
    return {
        "n": draw(st.integers(0, 3)),
        "m": draw(st.one_of(st.integers(0, 40), st.integers(SPAN - 2, 3 * SPAN))),
        "mask": draw(st.sampled_from(sorted(MASKS))),
        "heads": draw(st.sampled_from([(4, 4), (2, 2), (1, 1), (2, 4), (4, 1)])),
        "padding": draw(st.sampled_from(["none", "full", "left", "random", "all of one"])),
        "scored": draw(st.sampled_from(["plain", "bias", "score", "block bias"])),
        "seed": draw(st.integers(0, 10**6)),
    }


def tensors(scene: dict[str, Any]) -> tuple[list[Tensor], Tensor | None]:
    """q (2,4,n,6), k (2,·,m,6), v (2,·,m,5), a key bias (2,4,m), and padding (2,m)."""
    n, m, (k_heads, v_heads) = scene["n"], scene["m"], scene["heads"]
    draw = torch.Generator().manual_seed(scene["seed"])
    shapes = (2, 4, n, 6), (2, k_heads, m, 6), (2, v_heads, m, 5), (2, 4, m)
    leaves = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    padding = torch.ones(2, m, dtype=torch.bool)
    if scene["padding"] == "left":
        padding[1, : m // 2] = False
    elif scene["padding"] == "random":
        padding = torch.rand(2, m, generator=draw) > 0.3
    elif scene["padding"] == "all of one":
        padding[0] = False
    return leaves, None if scene["padding"] == "none" else padding


def ripple(q: Tensor, pairs: Pairs) -> tuple[int, Tensor]:
    """A bias of every query with every key."""
    return 0, (q.sum(-1, keepdim=True) * 0.1 * pairs.key).sin()


def method_of(scene: dict[str, Any], bias: Tensor, normalise: Normaliser) -> Scored:
    """A method with the bias or score that the scene asks for."""
    kind = scene["scored"]
    return Scored(
        normalise,
        key_bias=bias if kind != "plain" else None,
        score=(lambda s, b, h, i, j: s * 0.5 - 0.01 * (h + j - i)) if kind == "score" else None,
        block_bias=ripple if kind == "block bias" else None,
    )


@settings(max_examples=80, deadline=None)
@given(scenes(), st.sampled_from(sorted(NORMALISERS)))
def test_split_equals_dense_whatever_padding_holds(scene: dict[str, Any], normalise: str) -> None:
    (q, k, v, bias), padding = tensors(scene)
    call = Call(mask=MASKS[scene["mask"]], padding=padding)
    method, online = method_of(scene, bias, NORMALISERS[normalise]), normalise == "softmax"
    dirty = [k.clone(), v.clone()]
    if padding is not None:
        for x in dirty:
            x.masked_fill_(~padding[:, None, :, None], NAN)
    with torch.no_grad():
        dense = attend(q, k, v, call, method, impl="dense", need_lse=online)
        split = attend(q, dirty[0], dirty[1], call, method, impl="split", need_lse=online)
    close(split.output, dense.output, "output", 1e-9)
    if online:
        same(torch.isneginf(split.row_lse), torch.isneginf(dense.row_lse), "rows without a key")
        finite = ~torch.isneginf(dense.row_lse)
        close(split.row_lse[finite], dense.row_lse[finite], "log-sum-exp", 1e-9)


@settings(max_examples=30, deadline=None)
@given(scenes(), st.sampled_from(sorted(NORMALISERS)))
def test_gradients_of_splits(scene: dict[str, Any], normalise: str) -> None:
    leaves, padding = tensors(scene)
    call = Call(mask=MASKS[scene["mask"]], padding=padding)
    found = []
    for impl in ("split", "dense"):
        q, k, v, bias = inputs = [x.clone().requires_grad_() for x in leaves]
        method = method_of(scene, bias, NORMALISERS[normalise])
        out = attend(q, k, v, call, method, impl=impl).output  # type: ignore[arg-type]
        slopes = torch.autograd.grad(out.sin().sum(), inputs, allow_unused=True)
        found.append(
            [torch.zeros_like(x) if g is None else g for g, x in zip(slopes, inputs, strict=True)]
        )
    for name, got, expected in zip(("q", "k", "v", "bias"), *found, strict=True):
        close(got, expected, name, 1e-8, floor=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_splits_are_as_precise_as_dense(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, n, 32, generator=draw) for n in (1, 5000, 5000))
    with torch.no_grad():
        q, k, v = (x.to(dtype) for x in (q, k, v))
        truth = attend(q.double(), k.double(), v.double(), Call(), Scored()).output
        errors = [
            (attend(q, k, v, Call(), Scored(), impl=impl).output - truth).abs().max().item()  # type: ignore[arg-type]
            for impl in ("split", "dense")
        ]
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * truth.abs().max().item()


def test_hidden_spans_are_not_read() -> None:
    m = 6 * SPAN
    mask = Causal() & Window(100) | Sinks(4)
    x = torch.randn(1, 2, m, 8, dtype=torch.float64)
    q = torch.randn(1, 2, 1, 8, dtype=torch.float64)
    spans = spans_of(mask, Call().frame(q, x))
    assert [keys for keys, _ in spans] == [slice(0, SPAN), slice(5 * SPAN, 6 * SPAN)]
    unread = x.clone()
    unread[:, :, SPAN : 5 * SPAN] = NAN
    with torch.no_grad():
        got = attend(q, unread, unread, Call(mask=mask), Scored(), impl="split").output
    close(got, attend(q, x, x, Call(mask=mask), Scored(), impl="dense").output, "output")


def test_spans_tell_full_from_partial_and_join() -> None:
    m = 4 * SPAN + 7
    x = torch.zeros(1, 1, m, 1)
    padding = torch.ones(1, m, dtype=torch.bool)
    assert spans_of(None, Call().frame(x, x)) == [(slice(0, m), True)]
    padding[0, :10] = False
    call = Call(mask=Causal(), padding=padding)
    found = spans_of(call.visibility(), call.frame(x[:, :, :1], x))
    assert found == [(slice(0, SPAN), False), (slice(SPAN, m), True)]
    assert spans_of(MASKS["nobody"], call.frame(x[:, :, :1], x)) == [(slice(0, m), False)]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.sampled_from([(4, 4), (4, 2), (6, 1)])),
    n=st.integers(1, 3),
    w=st.integers(1, 300),
    gap=st.integers(0, 5),
    own=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_value_sums(
    shape: tuple[int, tuple[int, int]], n: int, w: int, gap: int, own: bool, seed: int
) -> None:
    b, (heads, v_heads) = shape
    draw = torch.Generator().manual_seed(seed)
    v = torch.randn(b, v_heads, 50 + gap, 3, generator=draw, dtype=torch.float64)[:, :, :50]
    weights = torch.randn(b, heads, n, w, generator=draw, dtype=torch.float64)
    rows = torch.randint(0, 50, (b, heads, n, w) if own else (1, 1, 1, w), generator=draw)
    near = repeat_heads(v, heads)[:, :, None].expand(-1, -1, n, -1, -1)
    near = near.gather(3, rows.expand(b, heads, n, w)[..., None].expand(-1, -1, -1, -1, 3))
    expected = (weights[..., None, :] @ near)[..., 0, :]
    close(value_sums(weights, v, rows), expected, "sums", 1e-12)
    if own:
        same(take_rows(v, rows), near, "taken")


def test_a_cache_with_room_is_read_in_place() -> None:
    k, v = (torch.randn(1, 4, 3000, 8) for _ in range(2))
    positions = torch.arange(3001)[None]
    real = torch.ones(1, 3001, dtype=torch.bool)
    cache = Keys(k, v, positions[:, :3000], real[:, :3000])
    grown = extended(cache, k[:, :, :1], v[:, :, :1], positions[:, 3000:], real[:, 3000:])
    assert not grown.v.is_contiguous()
    q = torch.randn(1, 4, 1, 8)
    with torch.no_grad():
        split = run_splits(q, grown.k, grown.v, Call(), Scored(), need_lse=False).output
        close(split, attend(q, grown.k, grown.v, Call(), Scored(), impl="dense").output, "o", 1e-5)


def picked(n: int, m: int, heads: int = 4, k_heads: int = 4, **fields: Any) -> Decision:
    """What `auto` picks without gradients."""
    q = torch.zeros(1, heads, n, 8, **fields)
    k = torch.zeros(1, k_heads, m, 8, **fields)
    return decide(q, k, Call(mask=Causal()), Scored())


def test_who_is_served() -> None:
    assert picked(1, SPLIT_FROM).impl == "split"
    assert picked(1, SPLIT_FROM, k_heads=1).impl == "split"
    assert picked(1, SPLIT_FROM_HALF, dtype=torch.bfloat16).impl == "split"
    assert picked(1, SPLIT_FROM - 1).impl == "sdpa"
    assert picked(2, SPLIT_FROM).impl == "sdpa"
    assert picked(1, SPLIT_FROM, device="meta").impl != "split"
    assert picked(1, SPLIT_FROM, requires_grad=True).impl != "split"
    with torch.no_grad():
        assert picked(1, SPLIT_FROM, requires_grad=True).impl == "split"


def test_a_layer_decodes_through_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.core.decoding.SPLIT_FROM", 64)
    layer: Any = create("softmax", dim=16, heads=2)
    x = torch.randn(2, 70, 16)
    padding = torch.ones(x.shape[:2], dtype=torch.bool)
    padding[1, :30] = False
    call = Call(mask=Causal(), padding=padding)
    with torch.no_grad():
        _, state = layer.step(x[:, :-1], None, call.but(padding=padding[:, :-1]))
        last, _ = layer.step(x[:, -1:], state)
        (found,) = explain(lambda call: layer.step(x[:, -1:], state, call), Call(mask=Causal()))
        close(last, layer(x, call)[:, -1:], "last token", 1e-5)
    assert found.impl == "split"
    assert "one query" in found.reason


def test_splits_have_no_log_sum_exp_without_softmax() -> None:
    x = torch.zeros(1, 1, 3, 2)
    with pytest.raises(UnsupportedError, match="log-sum-exp"):
        attend(x, x, x, Call(), Scored(TaylorWeights()), impl="split", need_lse=True)
