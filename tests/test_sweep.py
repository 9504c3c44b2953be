"""The chunk form's own backward, its memory, and memories that are handed over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import regard.core.fade
from regard.core.call import Call
from regard.core.mask import Causal
from regard.core.recurrent import Form, Memory, Recurrent, recur
from regard.core.sweep import sweep
from regard.testing.compare import close, same

CAUSAL = Call(mask=Causal())
KINDS = ("none", "head", "token", "channel")


def problem(n: int, kind: str) -> list[Tensor]:
    """q, k, v, a start state and, unless `kind` is "none", the log decay; float64, gradients on."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, 2, n, 4), (1, 2, n, 4), (1, 2, n, 3), (1, 2, 4, 3)]
    shapes += {"none": [], "head": [(2,)], "token": [(1, 2, n)], "channel": [(1, 2, n, 4)]}[kind]
    leaves = [torch.rand(*s, generator=generator, dtype=torch.float64) for s in shapes]
    return [(-x if index == 4 else x).requires_grad_() for index, x in enumerate(leaves)]


def run(*leaves: Tensor, form: Form = "chunk", chunk: int = 3) -> tuple[Tensor, Tensor]:
    q, k, v, start, *decay = leaves
    method = Recurrent(decay[0] if decay else None, chunk=chunk)
    result = recur(q, k, v, CAUSAL, method, state=Memory(start), form=form)
    return result.output, result.state.content


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    assert torch.autograd.gradcheck(run, problem(8, kind), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [1, 200, 1000])
def test_groups_of_any_size_agree(kind: str, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = problem(61, kind)
    monkeypatch.setattr(regard.core.fade, "_ON_CPU", room)
    results = []
    for form in ("scan", "chunk"):
        o, state = run(*leaves, form=form, chunk=8)
        target = o.sin().sum() + state.sin().sum()
        results.append([o, state, *torch.autograd.grad(target, leaves)])
    for index, (a, b) in enumerate(zip(*results, strict=True)):
        close(b, a, f"tensor {index}", 1e-12)


class Growing(TorchDispatchMode):
    """Sizes of the new tensors that hold more than `limit` numbers."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.made = limit, list[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view and out.numel() > self.limit:
            self.made.append(out.numel())
        return out


@pytest.mark.parametrize("kind", ["none", "head", "token"])
def test_inference_makes_nothing_that_grows_but_the_output(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regard.core.fade, "_ON_CPU", 1024)
    q, k, v, start, *decay = (x.detach() for x in problem(5000, kind))
    own = decay[0].view(1, 2, -1, 1) if decay else None
    with Growing(3000) as seen:
        sweep(q, k, v, own, start, 16)
    assert seen.made == [v.numel()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_spare_memory_is_overwritten(kind: str) -> None:
    q, k, v, start, *decay = (x.detach() for x in problem(5, kind))
    truth, last = run(q, k, v, start, *decay, form="scan")
    state, kept = Memory(start), start.clone()
    for t in range(5):
        own = [d if d.ndim == 1 else d[:, :, t : t + 1] for d in decay]
        method = Recurrent(own[0] if own else None)
        now = slice(t, t + 1)
        result = recur(q[:, :, now], k[:, :, now], v[:, :, now], CAUSAL, method, state=state)
        close(result.output, truth[:, :, t : t + 1], f"token {t}", 1e-12)
        if t == 0:
            same(start, kept, "a memory that was not handed over")
        else:
            assert result.state.content.data_ptr() == state.content.data_ptr()
        state = result.state if t else result.state.handed_over()
    close(state.content, last, "last state", 1e-12)
