"""The recurrent family: forms of the recurrence agree for every kind of decay, and known limits of
its methods.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard.core.call import Call
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mask import Causal
from regard.core.recurrent import Form, Memory, Recurrent, recur
from regard.features.hedgehog import HedgehogMap
from regard.features.lrpe import Lrpe
from regard.features.mimicry import linear_weights, mimicry_loss, softmax_weights
from regard.features.rotary import rotary_angles, rotate
from regard.layers.rat import Rat
from regard.operators.flowformer import flowformer
from regard.operators.lightning import layer_slopes, lightning
from regard.operators.softmax import softmax
from regard.testing.compare import close, finite

CAUSAL = Call(mask=Causal())
KINDS = ("none", "head", "token", "channel")
several = settings(max_examples=40, deadline=None, database=None, derandomize=True)


def problem(
    n: int, kind: str, seed: int, kv_heads: int = 4, strength: float = 2.0
) -> tuple[list[Tensor], Tensor | None]:
    """Features, values (float64, gradients on) and the log decay of a random recurrence."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    leaves = [draw(2, h, n, d).requires_grad_() for h, d in ((4, 5), (kv_heads, 5), (kv_heads, 3))]
    shape = {"none": (), "head": (4,), "token": (2, 4, n), "channel": (2, 4, n, 5)}[kind]
    decay = None if kind == "none" else (-strength * draw(*shape)).requires_grad_()
    return leaves, decay


def run(
    leaves: list[Tensor],
    decay: Tensor | None,
    form: Form,
    chunk: int = 64,
    normalise: bool = True,
    rows: slice = slice(None),
    state: Memory | None = None,
    call: Call = CAUSAL,
) -> tuple[Tensor, Memory]:
    q, k, v = (x[:, :, rows] for x in leaves)
    own = decay if decay is None or decay.ndim == 1 else decay[:, :, rows]
    method = Recurrent(own, normalise=normalise, chunk=chunk)
    result = recur(q, k, v, call, method, state=state, form=form)
    return result.output, result.state


def with_gradients(o: Tensor, state: Memory, leaves: list[Tensor]) -> list[Tensor]:
    target = o.sin().sum() + state.content.sin().sum()
    found = torch.autograd.grad(target, leaves, allow_unused=True)
    zeros = [torch.zeros_like(x) for x in leaves]
    gradients = [z if g is None else g for g, z in zip(found, zeros, strict=True)]
    return [o, state.content, *gradients]


def agree(got: list[Tensor], expected: list[Tensor], what: str) -> None:
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        message = f"{what}, tensor {index}"
        torch.testing.assert_close(
            a, b, rtol=1e-10, atol=1e-12, msg=lambda m, w=message: f"{w}: {m}"
        )


@several
@given(
    n=st.integers(1, 70),
    kind=st.sampled_from(KINDS),
    chunk=st.sampled_from((1, 7, 64, 0)),
    kv_heads=st.sampled_from((1, 2, 4)),
    normalise=st.booleans(),
    seed=st.integers(0, 99),
)
def test_forms_agree(
    n: int, kind: str, chunk: int, kv_heads: int, normalise: bool, seed: int
) -> None:
    leaves, decay = problem(n, kind, seed, kv_heads)
    every = [*leaves, *([] if decay is None else [decay])]
    expected = with_gradients(*run(leaves, decay, "parallel", normalise=normalise), every)
    for form in ("chunk", "scan"):
        got = run(leaves, decay, form, chunk or n, normalise)
        agree(with_gradients(*got, every), expected, f"{form} against parallel")


@several
@given(
    n=st.integers(1, 60),
    kind=st.sampled_from(KINDS),
    chunk=st.sampled_from((1, 7, 64)),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_state_continues(n: int, kind: str, chunk: int, seed: int, data: st.DataObject) -> None:
    leaves, decay = problem(n, kind, seed, kv_heads=2)
    every = [*leaves, *([] if decay is None else [decay])]
    expected = with_gradients(*run(leaves, decay, "parallel"), every)
    cut = data.draw(st.integers(0, n))
    forms = data.draw(st.tuples(*[st.sampled_from(("auto", "chunk", "scan", "parallel"))] * 2))
    first, state = run(leaves, decay, forms[0], chunk, rows=slice(0, cut))
    rest, state = run(leaves, decay, forms[1], chunk, rows=slice(cut, n), state=state)
    agree(with_gradients(torch.cat([first, rest], 2), state, every), expected, f"{forms} at {cut}")


@several
@given(
    n=st.integers(1, 40),
    kind=st.sampled_from(KINDS),
    form=st.sampled_from(("chunk", "scan", "parallel")),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_padded_tokens_are_as_if_absent(
    n: int, kind: str, form: Form, seed: int, data: st.DataObject
) -> None:
    leaves, decay = problem(n, kind, seed)
    real = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    padding = real.expand(2, n)
    call = CAUSAL.but(padding=padding, query_padding=padding)
    dirty = [x.masked_fill(~real[:, None], float("nan")) for x in leaves]
    o, state = run(dirty, decay, form, 7, call=call)
    own = decay if decay is None or decay.ndim == 1 else decay[:, :, real]
    alone, after = run([x[:, :, real] for x in leaves], own, "parallel")
    close(o[:, :, real], alone, "real rows", 1e-10)
    close(state.content, after.content, "state", 1e-10)
    assert not o[:, :, ~real].any()


@pytest.mark.parametrize("kind", ["head", "token", "channel"])
@pytest.mark.parametrize("form", ["chunk", "scan", "parallel"])
@pytest.mark.parametrize("strength", [200.0, 1e5])
def test_strong_decay_in_float32(kind: str, form: Form, strength: float) -> None:
    """Gaps that span strong decays vanish; gaps beside them keep their digits."""
    leaves, decay = problem(130, kind, 1, strength=strength)
    assert decay is not None
    if decay.ndim > 1:
        with torch.no_grad():
            decay[:, :, 1::2] *= 1e-3 / strength
    every = [*leaves, decay]
    truth = with_gradients(*run(leaves, decay, "scan", normalise=False), every)
    narrow = [x.detach().float().requires_grad_() for x in every]
    got = with_gradients(*run(narrow[:3], narrow[3], form, normalise=False), narrow)
    for index, (a, b) in enumerate(zip(got, truth, strict=True)):
        finite(a, f"tensor {index}")
        close(a, b, f"tensor {index}", 1e-5)


@pytest.mark.parametrize("kind", ["token", "channel"])
def test_infinite_decay_forgets_everything(kind: str) -> None:
    leaves, decay = problem(20, kind, 2)
    assert decay is not None
    with torch.no_grad():
        decay[:, :, 11] = -math.inf
    for form in ("chunk", "scan", "parallel"):
        o, state = run(leaves, decay, form, 8)
        finite(state.content, form)
        alone, after = run(leaves, decay, "scan", rows=slice(11, 20))
        close(o[:, :, 11:], alone, form, 1e-12)
        close(state.content, after.content, form, 1e-12)
        gradients = torch.autograd.grad(o.sum(), [*leaves, decay])
        assert all(torch.isfinite(g).all() for g in gradients)


def test_bfloat16_carries_a_float32_state() -> None:
    leaves, decay = problem(300, "token", 3)
    low = [x.detach().bfloat16() for x in leaves]
    o, state = run(low, decay, "auto")
    wide, _ = run([x.double() for x in low], decay, "parallel")
    assert o.dtype == torch.bfloat16
    assert state.content.dtype == torch.float32
    close(o, wide, "bfloat16", 2**-8)


def test_noncausal_is_the_last_causal_row() -> None:
    leaves, _ = problem(9, "none", 4)
    causal, _ = run(leaves, None, "scan")
    for form in ("auto", "parallel"):
        o = recur(*leaves, Call(), Recurrent(normalise=True), form=form).output
        close(o[:, :, -1], causal[:, :, -1], form, 1e-12)


def test_refusals() -> None:
    leaves, decay = problem(6, "token", 5)
    q, k, v = leaves
    with pytest.raises(ArgumentError, match="log_decay"):
        recur(q, k, v, CAUSAL, Recurrent(torch.zeros(3)))
    with pytest.raises(ArgumentError, match=r"state\.content"):
        recur(q, k, v, CAUSAL, Recurrent(), state=Memory(torch.zeros(2, 4, 5, 4)))
    with pytest.raises(ArgumentError, match="chunk"):
        recur(q, k, v, CAUSAL, Recurrent(chunk=0))
    with pytest.raises(ArgumentError, match="form"):
        recur(q, k, v, CAUSAL, Recurrent(), form="fast")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="decay"):
        recur(q, k, v, Call(), Recurrent(decay))
    with pytest.raises(UnsupportedError, match="6 queries and 5 keys"):
        recur(q, k[:, :, 1:], v[:, :, 1:], CAUSAL, Recurrent())
    with pytest.raises(ArgumentError, match="slopes"):
        lightning(q, k, v, CAUSAL, slopes=(0.1, 0.2))
    with pytest.raises(UnsupportedError, match="causal cross"):
        flowformer(q, k[:, :, 1:], v[:, :, 1:], CAUSAL)


def test_lightning_limits() -> None:
    """No slope is plain linear attention, an endless one sees only the own token."""
    (q, k, v), _ = problem(30, "none", 6)
    plain = lightning(q, k, v, CAUSAL, slopes=None).output
    close(lightning(q, k, v, CAUSAL, slopes=(0.0,) * 4).output, plain, "slope 0", 1e-12)
    own = (q * k).sum(-1, keepdim=True) * v
    close(lightning(q, k, v, CAUSAL, slopes=(1e9,) * 4).output, own, "slope 1e9", 1e-12)


def test_deeper_layers_forget_more_slowly() -> None:
    slopes = [layer_slopes(6, layer, 4) for layer in range(4)]
    assert all(
        a > b > 0 for first, second in pairwise(slopes) for a, b in zip(first, second, strict=True)
    )
    assert max(slopes[-1]) < 1e-5


def test_lrpe_depends_on_distance_only() -> None:
    lrpe = Lrpe(2, 8).double()
    x = torch.ones(1, 2, 12, 8, dtype=torch.float64)
    q, k = lrpe(x, x, torch.arange(12)[None])
    scores = q @ k.mT
    close(scores[..., 1:, 1:], scores[..., :-1, :-1], "Toeplitz", 1e-12)
    shifted = lrpe(x, x, torch.arange(12)[None] + 10**6)
    close(shifted[0] @ shifted[1].mT, scores, "far away", 1e-8)


def test_flow_without_contrast_is_a_gated_mean() -> None:
    """Equal queries and keys: no key wins, each query receives 1, so o = sigmoid(1) mean(v)."""
    v = torch.randn(1, 2, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    zero = torch.zeros_like(v)
    gate = torch.sigmoid(torch.tensor(1.0, dtype=torch.float64))
    everything = flowformer(zero, zero, v, Call()).output
    close(everything, (gate * v.mean(2, keepdim=True)).expand_as(v), "noncausal", 1e-5)
    means = v.cumsum(2) / torch.arange(1, 10)[:, None]
    # causal sums weigh key j by t_j / O_j = 1 / (q . k), so each query receives 1 as well
    close(flowformer(zero, zero, v, CAUSAL).output, gate * means, "causal", 1e-5)


def test_flow_without_clamp_survives_strong_competition() -> None:
    q, k, v = (50 * x.detach().float() for x in problem(40, "none", 9)[0])
    o = flowformer(q - 25, k - 25, v, CAUSAL, clamp=None).output
    finite(o, "no clamp")


def rows_of_one(weights: Tensor) -> None:
    assert (weights >= 0).all()
    close(weights.sum(-1), torch.ones_like(weights[..., 0]), "rows", 1e-12)


@pytest.mark.parametrize("activation", ["softmax", "exp", "joint", "elu", "relu"])
def test_hedgehog_weights_are_weights(activation: str) -> None:
    (q, k, _), _ = problem(11, "none", 10)
    feature = HedgehogMap(4, 5, activation=activation).double()  # type: ignore[arg-type]
    rows_of_one(linear_weights(feature(q), feature(k), CAUSAL))
    rows_of_one(softmax_weights(q, k, CAUSAL))


def test_distilled_hedgehog_beats_elu() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 32, 8).unbind(0)
    sides = [HedgehogMap(2, 8), HedgehogMap(2, 8)]
    optimiser = torch.optim.Adam([p for side in sides for p in side.parameters()], lr=0.03)
    losses = []
    for _ in range(60):
        loss = mimicry_loss(q, k, sides[0](q), sides[1](k), CAUSAL)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    elu = HedgehogMap(2, 8, activation="elu")
    assert losses[-1] < 0.98 * losses[0]
    assert losses[-1] < mimicry_loss(q, k, elu(q), elu(k), CAUSAL).item()


def test_mimicry_ignores_padded_queries() -> None:
    (q, k, _), _ = problem(10, "none", 11)
    feature = HedgehogMap(4, 5).double()
    short = [x[:, :, :7] for x in (q, k)]
    expected = mimicry_loss(*short, *(feature(x) for x in short), CAUSAL)
    padding = torch.arange(10).expand(2, 10) < 7
    call = CAUSAL.but(padding=padding, query_padding=padding)
    close(mimicry_loss(q, k, feature(q), feature(k), call), expected, "padding", 1e-12)


def rat(chunk: int, groups: int = 2) -> Rat:
    torch.manual_seed(1)
    return Rat(16, 4, chunk=chunk, groups=groups).double()


def test_rat_in_one_chunk_is_a_gated_recurrent_network() -> None:
    layer, x = rat(50), torch.randn(2, 13, 16, dtype=torch.float64)
    z, v, g, _, _ = layer.in_proj(x).split(layer.widths, -1)
    gate, mean, rows = (g + layer.gate_bias).sigmoid(), torch.zeros(2, 16, dtype=torch.float64), []
    for t in range(13):
        mean = gate[:, t] * mean + (1 - gate[:, t]) * v[:, t]
        rows.append(mean)
    expected = layer.out_proj(z.sigmoid() * torch.stack(rows, 1))
    close(layer(x, CAUSAL), expected, "one chunk", 1e-12)


def test_rat_in_chunks_of_one_is_softmax_attention() -> None:
    layer, x = rat(1), torch.randn(2, 13, 16, dtype=torch.float64)
    with torch.no_grad():
        layer.gate_bias.fill_(-1e9)
    z, v, _, q, k = layer.in_proj(x).split(layer.widths, -1)
    q, k = (y.unflatten(-1, (2, 4)).transpose(1, 2).repeat(1, 2, 1, 1) for y in (q, k))
    angles = rotary_angles(torch.arange(13), 4)
    v = v.unflatten(-1, (4, 4)).transpose(1, 2)
    o = softmax(rotate(q, angles), rotate(k, angles), v, CAUSAL).output
    expected = layer.out_proj(z.sigmoid() * o.transpose(1, 2).flatten(2))
    close(layer(x, CAUSAL), expected, "chunks of one", 1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 4, 16])
def test_rat_decodes_ragged_rows(chunk: int) -> None:
    """Rows that stand at different places of a chunk, several tokens at a time."""
    layer, x = rat(chunk), torch.randn(3, 15, 16, dtype=torch.float64)
    padding = torch.ones(3, 15, dtype=torch.bool)
    padding[0, :2] = padding[1, 4:9] = padding[2, 14:] = False
    expected = layer(x, CAUSAL.but(padding=padding))
    state, rows = None, []
    for part in (slice(0, 5), slice(5, 6), slice(6, 12), slice(12, 15)):
        y, state = layer.step(x[:, part], state, CAUSAL.but(padding=padding[:, part]))
        rows.append(y)
    close(torch.cat(rows, 1)[padding], expected[padding], f"chunk {chunk}", 1e-12)
