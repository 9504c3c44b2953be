"""Checks of gradients, precision, compilation and counted cost."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from regard.core.card import Card
from regard.core.count import count_flops
from regard.testing.compare import close, error, finite
from regard.testing.subject import Subject


def gradients(card: Card) -> None:
    """Gradients of inputs and parameters agree with finite differences in float64, none is cut."""
    for pattern in card.patterns:
        subject = Subject(card, pattern)
        inputs = [x.requires_grad_() for x in subject.inputs()]
        assert torch.autograd.gradcheck(
            _with_parameters(subject), _leaves(subject, inputs), fast_mode=True, atol=1e-6
        )


def _leaves(subject: Subject, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    own = subject.built.parameters() if isinstance(subject.built, nn.Module) else ()
    return (*inputs, *(p.detach().clone().requires_grad_() for p in own))


def _with_parameters(subject: Subject) -> Any:
    count = len(subject.inputs())
    if not isinstance(subject.built, nn.Module):
        return lambda *leaves: subject.run(list(leaves))
    names = [name for name, _ in subject.built.named_parameters()]
    module = subject.built

    def run(*leaves: Tensor) -> Tensor:
        values = dict(zip(names, leaves[count:], strict=True))
        twin = Subject.__new__(Subject)
        twin.__dict__.update(subject.__dict__)
        twin.built = lambda *args, **kwargs: functional_call(module, values, args, kwargs)  # type: ignore[assignment]
        return twin.run(list(leaves[:count]))

    return run


def precision(card: Card) -> None:
    """float32 stays within 1e-4 of float64; in bfloat16 no form errs more than twice its plain
    form.
    """
    for pattern in card.patterns:
        reference = Subject(card, pattern)
        inputs = reference.inputs()
        truth = reference.run(inputs)
        close(_lower(card, pattern, inputs, torch.float32), truth, f"{pattern}, float32", 1e-4)
        if card.forms is None:
            finite(_lower(card, pattern, inputs, torch.bfloat16), f"{pattern}, bfloat16")
            continue
        option, values = card.forms
        plain = error(_lower(card, pattern, inputs, torch.bfloat16, {option: values[0]}), truth)
        for value in values[1:]:
            got = error(_lower(card, pattern, inputs, torch.bfloat16, {option: value}), truth)
            limit = 2 * plain + 2**-8
            assert got <= limit, (
                f"{pattern}, {option}={value}: {got:.1e} against {plain:.1e} for {values[0]}"
            )


def _lower(
    card: Card,
    pattern: Any,
    inputs: list[Tensor],
    dtype: torch.dtype,
    options: dict[str, Any] | None = None,
) -> Tensor:
    return Subject(card, pattern, dtype=dtype, options=options or {}).run(
        [x.to(dtype) for x in inputs]
    )


class _Narrow(TorchDispatchMode):
    """Remembers which operation made a floating-point tensor narrower than float64."""

    found: str = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        narrow = (torch.float32, torch.bfloat16, torch.float16)
        if isinstance(out, Tensor) and out.dtype in narrow and out.numel():
            self.found = self.found or str(func)
        return out


def double_throughout(card: Card) -> None:
    """A float64 call computes nothing in a narrower type on its way."""
    for pattern in card.patterns:
        subject = Subject(card, pattern)
        inputs = subject.inputs()
        with _Narrow() as mode:
            subject.run(inputs)
        assert not mode.found, f"{pattern}: {mode.found} made a tensor narrower than float64"


def huge_logits(card: Card) -> None:
    """Inputs a thousand times too large give finite outputs and gradients in float32."""
    for pattern in card.patterns:
        subject = Subject(card, pattern, dtype=torch.float32)
        inputs = [(1e3 * x).requires_grad_() for x in subject.inputs()]
        out = subject.run(inputs)
        finite(out, pattern)
        out.sum().backward()
        for x in inputs:
            finite(x.grad, f"{pattern}: gradient")


def compiles(card: Card) -> None:
    """torch.compile captures the whole call in one graph and computes the same."""
    for pattern in card.patterns:
        subject = Subject(card, pattern)
        inputs = subject.inputs()
        torch.compiler.reset()
        compiled = torch.compile(
            lambda *xs, s=subject: s.run(list(xs)), fullgraph=True, backend="aot_eager"
        )
        close(compiled(*inputs), subject.run(inputs), pattern, 1e-10)


_SIZES = {
    1: ((2560,), (5120,)),
    2: ((32, 32), (48, 48)),
    3: ((10, 10, 10), (14, 14, 14)),
}


def cost(card: Card) -> None:
    """The counted operations of one forward grow with the claimed power of the number of tokens."""
    grids = len(card.example.grid) if card.example.grid else 1
    for pattern in card.patterns:
        counts = []
        for size in _SIZES[grids]:
            subject = Subject(card, pattern, size=size, dtype=torch.float32, randomise=False)
            counts.append((subject.tokens, _operations(subject)))
        (n, small), (m, large) = counts
        exponent = math.log(large / small) / math.log(m / n)
        claimed = card.cost.time
        assert abs(exponent - claimed) <= 0.15, (
            f"{pattern}: N^{exponent:.2f} counted, N^{claimed} claimed"
        )


def _operations(subject: Subject) -> int:
    """Operations of one forward that was really run."""
    inputs = subject.inputs(batch=1)
    with torch.no_grad(), count_flops() as counter:
        subject.run(inputs)
    return counter.flops
