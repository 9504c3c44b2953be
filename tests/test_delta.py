"""The delta rule: its forms agree for every kind of decay, and it recalls what it should."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import regard.core.fade
from regard.core.call import Call
from regard.core.delta import DeltaForm, DeltaRule, delta, unit
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mask import Causal
from regard.core.recurrent import Memory, Recurrent, recur
from regard.testing.compare import close, finite, same

CAUSAL = Call(mask=Causal())
KINDS = ("none", "head", "token")
several = settings(max_examples=40, deadline=None, database=None, derandomize=True)


def problem(n: int, kind: str, seed: int, kv_heads: int = 4, strength: float = 2.0) -> list[Tensor]:
    """q, k (unit), v, beta and, unless `kind` is "none", the log decay; float64, gradients on."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    q, k, v = (draw(2, h, n, d) - 0.5 for h, d in ((4, 5), (kv_heads, 5), (kv_heads, 3)))
    leaves = [q, unit(k), v, 2 * draw(2, 4, n)]
    shape = {"none": None, "head": (4,), "token": (2, 4, n)}[kind]
    if shape is not None:
        leaves.append(-strength * draw(*shape))
    return [x.requires_grad_() for x in leaves]


def run(
    leaves: list[Tensor],
    form: DeltaForm,
    chunk: int = 32,
    rows: slice = slice(None),
    state: Memory | None = None,
    call: Call = CAUSAL,
) -> tuple[Tensor, Memory]:
    q, k, v, beta = (x[:, :, rows] for x in leaves[:4])
    decay = leaves[4] if len(leaves) == 5 else None
    if decay is not None and decay.ndim > 1:
        decay = decay[:, :, rows]
    method = DeltaRule(beta, decay, chunk)
    result = delta(q, k, v, call, method, state=state, form=form)
    return result.output, result.state


def with_gradients(o: Tensor, state: Memory, leaves: list[Tensor]) -> list[Tensor]:
    target = o.sin().sum() + state.content.sin().sum()
    return [o, state.content, *torch.autograd.grad(target, leaves)]


def agree(got: list[Tensor], expected: list[Tensor], what: str, tolerance: float = 1e-10) -> None:
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        close(a, b, f"{what}, tensor {index}", tolerance)


@several
@given(
    n=st.integers(1, 70),
    kind=st.sampled_from(KINDS),
    chunk=st.sampled_from((1, 7, 32, 0)),
    kv_heads=st.sampled_from((1, 2, 4)),
    seed=st.integers(0, 99),
)
def test_forms_agree(n: int, kind: str, chunk: int, kv_heads: int, seed: int) -> None:
    leaves = problem(n, kind, seed, kv_heads)
    expected = with_gradients(*run(leaves, "scan"), leaves)
    got = with_gradients(*run(leaves, "chunk", chunk or n), leaves)
    agree(got, expected, "chunk against scan")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [4, 16])
def test_groups_of_any_size_agree(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = problem(103, kind, 1)
    expected = with_gradients(*run(leaves, "scan"), leaves)
    for room in (1, 2000, 6000):
        monkeypatch.setattr(regard.core.fade, "_ON_CPU", room)
        agree(with_gradients(*run(leaves, "chunk", chunk), leaves), expected, f"room {room}")


@several
@given(
    n=st.integers(1, 60),
    kind=st.sampled_from(KINDS),
    chunk=st.sampled_from((1, 7, 32)),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_state_continues(n: int, kind: str, chunk: int, seed: int, data: st.DataObject) -> None:
    leaves = problem(n, kind, seed, kv_heads=2)
    expected = with_gradients(*run(leaves, "scan"), leaves)
    cut = data.draw(st.integers(0, n))
    forms = data.draw(st.tuples(*[st.sampled_from(("auto", "chunk", "scan"))] * 2))
    first, state = run(leaves, forms[0], chunk, slice(0, cut))
    rest, state = run(leaves, forms[1], chunk, slice(cut, n), state)
    agree(with_gradients(torch.cat([first, rest], 2), state, leaves), expected, f"cut at {cut}")


@several
@given(
    n=st.integers(1, 40),
    kind=st.sampled_from(KINDS),
    form=st.sampled_from(("chunk", "scan")),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_padded_tokens_are_as_if_absent(
    n: int, kind: str, form: DeltaForm, seed: int, data: st.DataObject
) -> None:
    leaves = problem(n, kind, seed)
    real = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    padding = real.expand(2, n)
    dirty = [
        x if x.ndim == 1 else x.masked_fill(~(real if x.ndim == 3 else real[:, None]), math.nan)
        for x in leaves
    ]
    o, state = run(dirty, form, 7, call=CAUSAL.but(padding=padding, query_padding=padding))
    alone, after = run([x if x.ndim == 1 else x[:, :, real] for x in leaves], "scan")
    close(o[:, :, real], alone, "real rows", 1e-10)
    close(state.content, after.content, "state", 1e-10)
    assert not o[:, :, ~real].any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_chunk_form(kind: str) -> None:
    leaves = problem(7, kind, 3)
    start = torch.rand(2, 4, 5, 3, dtype=torch.float64).requires_grad_()

    def both(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        o, state = run(list(inputs[:-1]), "chunk", 3, state=Memory(inputs[-1]))
        return o, state.content

    assert torch.autograd.gradcheck(both, (*leaves, start), fast_mode=True)


@pytest.mark.parametrize("kind", ["head", "token"])
@pytest.mark.parametrize("strength", [200.0, 1e5])
def test_strong_decay_in_float32(kind: str, strength: float) -> None:
    """Gaps that span strong decays vanish; gaps beside them keep their digits."""
    leaves = problem(130, kind, 1, strength=strength)
    if kind == "token":
        with torch.no_grad():
            leaves[4][:, :, 1::2] *= 1e-3 / strength
    truth = with_gradients(*run(leaves, "scan"), leaves)
    narrow = [x.detach().float().requires_grad_() for x in leaves]
    agree(with_gradients(*run(narrow, "chunk"), narrow), truth, "float32", 1e-5)


@pytest.mark.parametrize("form", ["chunk", "scan"])
def test_infinite_decay_forgets_everything(form: DeltaForm) -> None:
    leaves = problem(20, "token", 2)
    with torch.no_grad():
        leaves[4][:, :, 11] = -math.inf
    o, state = run(leaves, form, 8)
    alone, after = run(leaves, "scan", rows=slice(11, 20))
    close(o[:, :, 11:], alone, form, 1e-12)
    close(state.content, after.content, form, 1e-12)
    for gradient in torch.autograd.grad(o.sum(), leaves):
        finite(gradient, form)


def test_equal_keys_are_solved_without_loss() -> None:
    """The worst system: one key for all tokens, beta = 2: corrections alternate and never fade."""
    leaves = [x.detach() for x in problem(256, "none", 4)]
    leaves[1], leaves[3] = leaves[1][:, :, :1].expand(-1, -1, 256, -1), torch.full((2, 4, 256), 2.0)
    truth, _ = run([x.double() for x in leaves], "scan")
    got, _ = run([x.float() for x in leaves], "chunk", 64)
    close(got, truth, "float32", 1e-4)


def test_last_write_is_the_answer() -> None:
    """beta = 1: a key that was written twice answers with its second value, others are untouched;
    plain linear attention answers with sums.
    """
    keys = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 1, 1]][None, None]
    v = torch.randn(1, 1, 5, 3, dtype=torch.float64)
    for form in ("chunk", "scan"):
        state = delta(keys, keys, v, CAUSAL, DeltaRule(torch.ones(1, 1, 5)), form=form).state
        close(state.content[0, 0, :3], v[0, 0, [0, 4, 2]], form, 1e-12)
    added = recur(keys, keys, v, CAUSAL, Recurrent()).state.content
    close(added[0, 0, 1], v[0, 0, [1, 3, 4]].sum(0), "sum", 1e-12)


def test_a_spare_memory_is_overwritten() -> None:
    leaves = [x.detach() for x in problem(9, "token", 5)]
    expected, last = run(leaves, "scan")
    _, state = run(leaves, "chunk", rows=slice(0, 4))
    kept = state.content.clone()
    _, after = run(leaves, "auto", rows=slice(4, 5), state=state)
    same(state.content, kept, "a memory that was not handed over")
    state = state.handed_over()
    for t in range(4, 9):
        o, after = run(leaves, "auto", rows=slice(t, t + 1), state=state)
        close(o, expected[:, :, t : t + 1], f"token {t}", 1e-12)
        assert after.spare
        assert after.content.data_ptr() == state.content.data_ptr()
        state = after
    close(state.content, last.content, "last state", 1e-12)


def test_a_spare_memory_survives_training() -> None:
    leaves = problem(3, "token", 6)
    state = Memory(torch.ones(2, 4, 5, 3, dtype=torch.float64), spare=True)
    run(leaves, "auto", rows=slice(0, 1), state=state)
    assert bool((state.content == 1).all())


def test_refusals() -> None:
    q, k, v, beta, decay = problem(6, "token", 7)
    rule = DeltaRule(beta, decay)
    with pytest.raises(ArgumentError, match="beta"):
        delta(q, k, v, CAUSAL, DeltaRule(beta[:, :1]))
    with pytest.raises(ArgumentError, match="log_decay"):
        delta(q, k, v, CAUSAL, DeltaRule(beta, decay[..., None].expand(-1, -1, -1, 5)))
    with pytest.raises(ArgumentError, match="chunk"):
        delta(q, k, v, CAUSAL, DeltaRule(beta, decay, chunk=0))
    with pytest.raises(ArgumentError, match="form"):
        delta(q, k, v, CAUSAL, rule, form="parallel")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="time"):
        delta(q, k, v, Call(), rule)
    with pytest.raises(UnsupportedError, match="6 queries and 5 keys"):
        delta(q, k[:, :, 1:], v[:, :, 1:], CAUSAL, rule)
    with pytest.raises(ArgumentError, match=r"state\.content"):
        delta(q, k, v, CAUSAL, rule, state=Memory(torch.zeros(2, 4, 5, 4)))
