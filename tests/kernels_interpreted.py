"""The Triton kernels in Triton's interpreter; `test_kernels.py` runs this file in a process of its
own, because the interpreter must be chosen before triton is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.kernels.decay import decayed_attention
from regard.core.kernels.elementwise import sigmoid_attention
from regard.core.mask import Causal, Mask
from regard.core.recurrent import Memory
from regard.masks.window import Window
from regard.operators.lightning import lightning
from regard.operators.sigmoid import Sigmoid
from regard.testing.compare import error

LENGTHS = [
    *((1, 16, 1), (1, 64, 2), (17, 16, 2), (17, 64, 1), (64, 32, 2), (64, 64, 4)),
    *((130, 16, 1), (130, 32, 2), (130, 64, 2)),
]
"""Tokens, head width, query heads per key head."""
Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def draw(
    n: int, d: int, group: int = 1, m: int | None = None, e: int | None = None, batch: int = 1
) -> list[Tensor]:
    """q (B,H,N,D), k and v (B,2,M,·) in float64."""
    generator = torch.Generator().manual_seed(n + d)
    shapes = [(2 * group, n, d), (2, m or n, d), (2, m or n, e or d)]
    return [torch.randn(batch, *s, generator=generator, dtype=torch.float64) for s in shapes]


def with_gradients(run: Run, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, and input gradients of a target that is not symmetric in them."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    outputs = run(leaves)
    target = sum((x.double() * x.double().add(1).cos().detach()).sum() for x in outputs)
    return [*outputs, *torch.autograd.grad(target, leaves)]  # type: ignore[arg-type]


def as_good_as(fused: Run, plain: Run, inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """The kernel errs at most twice what the plain form does in the same dtype."""
    truth = with_gradients(plain, inputs, torch.float64)
    expected, got = (with_gradients(run, inputs, dtype) for run in (plain, fused))
    floor = 4 * torch.finfo(dtype).eps
    for index, (ours, theirs, exact) in enumerate(zip(got, expected, truth, strict=True)):
        assert ours.dtype == theirs.dtype
        limit = 2 * error(theirs, exact) + floor
        assert error(ours, exact) <= limit, (
            f"tensor {index}: {error(ours, exact):.1e} > {limit:.1e}"
        )


def sigmoid(impl: str, call: Call, **options: object) -> Run:
    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        q, k, v = inputs
        operator = Sigmoid(q.shape[1], q.shape[3], impl=impl, **options)  # type: ignore[arg-type]
        return [operator(q, k, v, call).output]

    return run


def decayed(form: str, call: Call, **options: object) -> Run:
    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        q, k, v, *state = inputs
        memory = Memory(state[0].to(torch.promote_types(q.dtype, torch.float32))) if state else None
        result = lightning(q, k, v, call, form=form, state=memory, **options)  # type: ignore[arg-type]
        return [result.output, result.state.content]

    return run


CAUSAL = Call(mask=Causal())


@pytest.mark.parametrize("mask", [None, Causal()], ids=["all", "causal"])
@pytest.mark.parametrize(("n", "d", "group"), LENGTHS)
def test_sigmoid(n: int, d: int, group: int, mask: Mask | None) -> None:
    call = Call(mask=mask)
    runs = (sigmoid(impl, call) for impl in ("triton", "dense"))
    as_good_as(*runs, draw(n, d, group), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sigmoid_in_16_bits(dtype: torch.dtype) -> None:
    runs = (sigmoid(impl, CAUSAL, logit_bias=-3.0) for impl in ("triton", "dense"))
    as_good_as(*runs, draw(70, 32, 2), dtype)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.5, "divide": "count"}, {"logit_bias": -2.0, "divide": "sqrt_row"}],
    ids=["count", "row"],
)
def test_sigmoid_options(options: dict[str, object]) -> None:
    runs = (sigmoid(impl, CAUSAL, **options) for impl in ("triton", "dense"))
    as_good_as(*runs, draw(40, 16), torch.float32)


def test_sigmoid_learns_its_temperature() -> None:
    q, k, v = (x.float() for x in draw(20, 16))
    found = []
    for impl in ("triton", "dense"):
        operator = Sigmoid(2, 16, temperature=0.3, learned_temperature=True, impl=impl)  # type: ignore[arg-type]
        operator(q, k, v, CAUSAL).output.sin().sum().backward()
        found.append(operator.temperature.grad)
    assert error(*found) < 1e-5


@pytest.mark.parametrize(("n", "m"), [(20, 70), (70, 20), (1, 33)])
@pytest.mark.parametrize("mask", [None, Causal()], ids=["all", "causal"])
def test_sigmoid_across(n: int, m: int, mask: Mask | None) -> None:
    """Fewer keys than queries leave causal rows without any; values of another width."""
    call = Call(mask=mask)
    runs = (sigmoid(impl, call) for impl in ("triton", "dense"))
    as_good_as(*runs, draw(n, 16, 2, m, e=32), torch.float32)


def test_sigmoid_at_positions_out_of_order() -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    call = CAUSAL.but(query_positions=order, key_positions=order.flip(0))
    runs = (sigmoid(impl, call) for impl in ("triton", "dense"))
    as_good_as(*runs, draw(40, 16), torch.float32)


def padded(n: int) -> Tensor:
    """Two rows: real tokens at the front of one, at the back and amid of the other."""
    padding = torch.ones(2, n, dtype=torch.bool)
    padding[0, n - 9 :] = False
    padding[1, : n // 2] = False
    padding[1, -3] = False
    return padding


@pytest.mark.parametrize("run", [sigmoid, decayed], ids=["sigmoid", "decayed"])
def test_padding_never_matters(run: Callable[..., Run]) -> None:
    padding = padded(50)
    call = CAUSAL.but(padding=padding).of_self()
    inputs = draw(50, 16, 2, batch=2)
    name = "dense" if run is sigmoid else "parallel"
    as_good_as(run("triton", call), run(name, call), inputs, torch.float32)
    poisoned = [x.masked_fill(~padding[:, None, :, None], float("nan")) for x in inputs]
    clean, dirty = (
        with_gradients(run("triton", call), x, torch.float32) for x in (inputs, poisoned)
    )
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("run", [sigmoid, decayed], ids=["sigmoid", "decayed"])
def test_the_future_is_invisible(run: Callable[..., Run]) -> None:
    inputs = [x.float() for x in draw(90, 16)]
    changed = [torch.cat([x[:, :, :50], 100 * x[:, :, 50:]], 2) for x in inputs]
    before, after = (run("triton", CAUSAL)(x)[0][:, :, :50] for x in (inputs, changed))
    assert torch.equal(before, after)


@pytest.mark.parametrize("run", [sigmoid, decayed], ids=["sigmoid", "decayed"])
def test_views_and_no_tokens(run: Callable[..., Run]) -> None:
    inputs = [x.float() for x in draw(30, 16, 2)]
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    views[0] = views[0].mT.contiguous().mT
    for a, b in zip(run("triton", CAUSAL)(inputs), run("triton", CAUSAL)(views), strict=True):
        assert torch.equal(a, b)
    nothing = run("triton", CAUSAL)([x[:, :, :0] for x in inputs])[0]
    assert nothing.shape == (1, 4, 0, 16)


@pytest.mark.parametrize("run", [sigmoid, decayed], ids=["sigmoid", "decayed"])
def test_huge_scores_stay_finite(run: Callable[..., Run]) -> None:
    inputs = [1e3 * x for x in draw(20, 16)]
    for x in with_gradients(run("triton", CAUSAL), inputs, torch.float32):
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("run", [sigmoid, decayed], ids=["sigmoid", "decayed"])
def test_one_graph(run: Callable[..., Run]) -> None:
    inputs = [x.float() for x in draw(20, 16, 2)]
    fused = run("triton", CAUSAL)
    compiled = torch.compile(lambda *x: fused(x)[0], fullgraph=True, backend="aot_eager")
    results = [
        with_gradients(lambda x, f=f: [f(*x)], inputs, torch.float32)
        for f in (compiled, lambda *x: fused(x)[0])
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("n", "d", "group"), LENGTHS)
def test_decayed(n: int, d: int, group: int) -> None:
    runs = (decayed(form, CAUSAL) for form in ("triton", "parallel"))
    seeded = torch.Generator().manual_seed(n * d)
    state = torch.randn(1, 2 * group, d, d, generator=seeded, dtype=torch.float64)
    as_good_as(*runs, [*draw(n, d, group), state], torch.float32)


@pytest.mark.parametrize("chunk", [16, 32, 64])
@pytest.mark.parametrize("slopes", [None, (0.0, 30.0), (1e-4, float("inf"))])
def test_decayed_chunks_and_slopes(chunk: int, slopes: tuple[float, float] | None) -> None:
    runs = [decayed(form, CAUSAL, slopes=slopes, chunk=chunk) for form in ("triton", "parallel")]
    as_good_as(*runs, draw(70, 16, e=32), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decayed_in_16_bits(dtype: torch.dtype) -> None:
    runs = (decayed(form, CAUSAL, slopes=(0.5, 0.1)) for form in ("triton", "parallel"))
    as_good_as(*runs, draw(70, 32), dtype)


def test_decayed_continues_from_its_state() -> None:
    inputs = [x.float() for x in draw(75, 16)]
    whole, last = decayed("triton", CAUSAL)(inputs)
    first, state = decayed("triton", CAUSAL)([x[:, :, :40] for x in inputs])
    second, end = decayed("triton", CAUSAL)([*(x[:, :, 40:] for x in inputs), state])
    assert error(torch.cat([first, second], 2), whole) < 1e-6
    assert error(end, last) < 1e-6


def test_the_operations_are_well_formed() -> None:
    q, k, v = (x.float().requires_grad_() for x in draw(20, 16, 2))
    clock = torch.arange(1, 21, dtype=torch.int32)[None]
    reach = [clock, clock, clock, clock - 1]
    torch.library.opcheck(sigmoid_attention, (q, k, v, torch.zeros(1, 20), reach, 0.25))
    state = torch.zeros(1, 4, 16, 16, requires_grad=True)
    torch.library.opcheck(decayed_attention, (q, k, v, state, [clock, -torch.ones(4)], 16))


@pytest.mark.parametrize(
    ("run", "lacks"),
    [
        (lambda q: sigmoid("triton", CAUSAL)([q.double()] * 3), "float64"),
        (lambda q: sigmoid("triton", CAUSAL)([q[..., :24]] * 3), "power of two"),
        (lambda q: sigmoid("triton", CAUSAL)([q[..., :8]] * 3), "from 16"),
        (lambda q: sigmoid("triton", Call(mask=Window(3)))([q] * 3), "Window"),
        (lambda q: sigmoid("triton", CAUSAL, alibi="distance")([q] * 3), "ALiBi"),
        (lambda q: decayed("triton", CAUSAL)([q.double()] * 3), "float64"),
        (lambda q: decayed("triton", CAUSAL)([q, q, q[..., :20]]), "v are 20"),
        (lambda q: decayed("triton", CAUSAL, chunk=48)([q] * 3), "chunks"),
        (lambda q: decayed("triton", CAUSAL.but(scale=1.0))([q] * 3), "scale"),
        (lambda q: decayed("triton", CAUSAL)([q, q[:, :, 1:], q[:, :, 1:]]), "keys"),
        (lambda q: decayed("triton", Call(mask=Causal() & Window(3)))([q] * 3), "mask"),
    ],
)
def test_refusals_name_what_is_lacking(run: Callable[[Tensor], object], lacks: str) -> None:
    with pytest.raises(UnsupportedError, match=lacks):
        run(torch.zeros(1, 2, 5, 32))


def test_a_state_of_another_shape_is_refused() -> None:
    x = torch.zeros(1, 2, 5, 16)
    with pytest.raises(ArgumentError, match=r"state\.content"):
        decayed("triton", CAUSAL)([x, x, x, torch.zeros(1, 2, 16, 8)])
