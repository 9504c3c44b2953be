"""Checks of executors: whichever serves the attention calls of a mechanism computes the same."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from regard.core import scored, unit
from regard.core.call import Call
from regard.core.card import Card
from regard.core.scored import Decision, Impl
from regard.core.weights import Scored
from regard.testing.compare import close
from regard.testing.limits import with_gradients
from regard.testing.subject import Subject

BLOCK = 5  # rows of a tile: ragged against the lengths of examples
SLIGHT = 1e-6  # of the largest gradient: some, as that of a bias on all keys, are truly zero

OTHERS: tuple[tuple[Impl, int | None], ...] = (
    ("sdpa", None),
    ("tiled", None),
    ("tiled", BLOCK),
    ("split", None),
)


@contextmanager
def served_by(impl: Impl, block: int | None = None) -> Iterator[list[Decision]]:
    """Inside, every attention call that leaves the choice open is served by this executor, if it
    can be; the list collects the decisions. block: rows of a tile.
    """
    choose, made = scored.decide, list[Decision]()

    def decided(
        q: Tensor, k: Tensor, call: Call, method: Scored, need_lse: bool = False
    ) -> Decision:
        lacks = scored.executor_lacks(impl, q, k, k, method, need_lse) or 0 in (
            q.shape[2],
            k.shape[2],
        )
        found = choose(q, k, call, method, need_lse) if lacks else Decision(impl, "the contract's")
        made.append(found)
        return found

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(scored, "decide", decided))
        for module in [m for name, m in sys.modules.items() if name.startswith("regard.")]:
            if hasattr(module, "TILED_FROM"):
                long = 1 if impl == "tiled" else 10**9
                patches.enter_context(mock.patch.object(module, "TILED_FROM", long))
        if block is not None:
            rows = mock.Mock(return_value=block)
            patches.enter_context(mock.patch.object(unit, "fitted_block", rows))
        yield made


def executors(card: Card) -> None:
    """Tiles, ragged ones too, splits and the fused kernel give the outputs and gradients of the
    whole matrix, wherever they can serve.
    """
    for pattern in card.patterns:
        subject = Subject(card, pattern)
        inputs = subject.inputs()
        with served_by("dense"):
            expected, expected_gradients = with_gradients(subject, inputs, {})
        floor = SLIGHT * max(float(g.abs().max()) for g in expected_gradients)
        for impl, block in OTHERS:
            what = f"{pattern}, {impl}{'' if block is None else f' in blocks of {block}'}"
            with served_by(impl, block):
                got, gradients = with_gradients(subject, inputs, {})
            close(got, expected, f"{what} against dense")
            for index, (a, b) in enumerate(zip(gradients, expected_gradients, strict=True)):
                close(a, b, f"{what}, gradient {index}", 1e-8, floor)


def flex(card: Card) -> None:
    """The compiled flex_attention gives the outputs of the whole matrix in float32, wherever it can
    serve; without gradients, which it has not on every device.
    """
    for pattern in card.patterns:
        subject: Any = Subject(card, pattern, dtype=torch.float32)
        inputs = subject.inputs()
        with torch.no_grad():
            with served_by("dense"):
                expected = subject.run(inputs)
            torch.compiler.reset()
            with served_by("flex"):
                close(subject.run(inputs), expected, f"{pattern}, flex against dense", 1e-5)
