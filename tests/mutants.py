"""Mutation test of the contract: every planted bug must be caught (`make mutants`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from regard.core import decoding, recurrent, scored, selected, state, tiling, unit
from regard.core import forms as core_forms
from regard.core.call import Call, Result
from regard.core.card import Card, Example
from regard.core.catalog import card
from regard.core.mask import Causal
from regard.core.scored import attend
from regard.core.weights import Scored
from regard.masks.window import Window
from regard.testing import CHECKS, checks_for, run_check

Plant = Callable[[], AbstractContextManager[Card]]
PLANTS: dict[str, Plant] = {}


def plant(function: Callable[[], Iterator[Card]]) -> None:
    PLANTS[function.__name__] = contextmanager(function)


def operator(like: str, function: Callable[..., Result]) -> Card:
    """The card of a good operator around a bad one."""
    return replace(card(like), build=function, forms=None)


@plant
def forgotten_mask() -> Iterator[Card]:
    def bad(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        return attend(q, k, v, call.but(mask=None), Scored())

    yield operator("softmax", bad)


@plant
def causal_by_row_index() -> Iterator[Card]:
    """Top-left alignment: right without a cache, wrong with one."""

    def bad(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        rows = torch.arange(q.shape[2])
        return attend(q, k, v, call.but(query_positions=rows), Scored())

    yield operator("softmax", bad)


@plant
def off_by_one_window() -> Iterator[Card]:
    def visible(self: Window, pairs: Any) -> Tensor:
        return (pairs.query - pairs.key).abs() <= self.size

    with mock.patch.object(Window, "visible", visible):
        yield card("sliding_window")


@plant
def cache_drops_a_key_too_early() -> Iterator[Card]:
    def alive(self: Window, pairs: Any) -> Tensor:
        return pairs.key > pairs.query - self.size + 1

    with mock.patch.object(Window, "alive", alive):
        yield card("sliding_window")


@plant
def cache_never_drops() -> Iterator[Card]:
    with mock.patch.object(Window, "alive", lambda self, pairs: pairs.key == pairs.key):
        yield card("sliding_window")


@plant
def causal_sees_one_ahead() -> Iterator[Card]:
    with mock.patch.object(Causal, "visible", lambda self, pairs: pairs.key <= pairs.query + 1):
        yield operator(
            "softmax", lambda q, k, v, call: attend(q, k, v, call, Scored(), impl="dense")
        )


@plant
def batch_leak() -> Iterator[Card]:
    def bad(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        out = attend(q, k, v, call, Scored()).output
        return Result(out + 1e-3 * out.mean(0, keepdim=True))

    yield operator("softmax", bad)


@plant
def cut_gradient() -> Iterator[Card]:
    def bad(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        return attend(q, k.detach(), v, call, Scored())

    yield operator("softmax", bad)


@plant
def padding_counted() -> Iterator[Card]:
    def bad(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        return attend(q, k, v, call.but(padding=None, query_padding=None), Scored())

    yield operator("softmax", bad)


@plant
def padding_poisons_gradient() -> Iterator[Card]:
    """Masked, but not cleaned: NaN in padding reaches the gradient."""
    with mock.patch.object(scored, "without_padding", lambda q, k, v, call: (q, k, v)):
        yield card("softmax")


@plant
def empty_row_averages() -> Iterator[Card]:
    def weights(self: Any, scores: Tensor, visible: Tensor, count: Tensor) -> Tensor:
        return torch.softmax(scores.masked_fill(~visible, torch.finfo(scores.dtype).min), -1)

    with mock.patch.object(scored.Softmax, "__call__", weights):
        yield operator(
            "softmax", lambda q, k, v, call: attend(q, k, v, call, Scored(), impl="dense")
        )


@plant
def scale_ignored() -> Iterator[Card]:
    with mock.patch.object(scored, "scale_of", lambda call, own, width: width**-0.5):
        yield card("softmax")


@plant
def groups_interleaved() -> Iterator[Card]:
    """Query head h reads key head h % H_k instead of h // g."""

    def bad(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        times = q.shape[1] // k.shape[1]
        return attend(q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1), call, Scored())

    yield operator("softmax", bad)


@plant
def input_modified() -> Iterator[Card]:
    def bad(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        result = attend(q, k, v, call, Scored())
        if not q.requires_grad:
            q *= 0.5
        return result

    yield operator("softmax", bad)


@plant
def unscaled_exponent_overflows() -> Iterator[Card]:
    def weights(self: Any, scores: Tensor, visible: Tensor, count: Tensor) -> Tensor:
        raw = scores.exp() * visible
        return raw / raw.sum(-1, keepdim=True).clamp_min(1e-30)

    with mock.patch.object(scored.Softmax, "__call__", weights):
        yield operator(
            "softmax", lambda q, k, v, call: attend(q, k, v, call, Scored(), impl="dense")
        )


@plant
def state_not_carried() -> Iterator[Card]:
    original = recurrent.chunked

    def bad(*args: Any) -> Any:
        forgotten = None if args[4] is None else torch.zeros_like(args[4])
        return original(*args[:4], forgotten, *args[5:])

    with mock.patch.object(recurrent, "chunked", bad):
        yield card("linear")


@plant
def decay_one_step_late() -> Iterator[Card]:
    original = core_forms.step

    def bad(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, memory: Tensor) -> Any:
        out, after = original(q, k, v, None, memory)
        return out, after if decay is None else after * decay.exp()[..., None]

    with mock.patch.object(core_forms, "step", bad):
        yield card("lightning")


@plant
def padding_in_normaliser() -> Iterator[Card]:
    with mock.patch.object(recurrent, "without_padding", lambda q, k, v, call: (q, k, v)):
        yield card("linear")


@plant
def quadratic_claimed_linear() -> Iterator[Card]:
    yield replace(card("softmax"), cost=replace(card("softmax").cost, time=1))


@plant
def constant_state_claimed() -> Iterator[Card]:
    yield replace(card("softmax"), cost=replace(card("softmax").cost, state="constant"))


@plant
def causality_claimed_without_it() -> Iterator[Card]:
    def bad(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        result = attend(q, k, v, call, Scored())
        return Result(result.output + 1e-6 * v.mean(2, keepdim=True))

    yield operator("uniform", bad)


@plant
def wrong_limit_claimed() -> Iterator[Card]:
    good = card("sliding_window")
    yield replace(good, limits=(replace(good.limits[0], options={"window": 4, "sinks": 0}),))


@plant
def choice_ignores_visibility() -> Iterator[Card]:
    """The best keys are chosen among all, so a later key pushes out an earlier one."""
    original = selected.choose

    def bad(importance: Tensor, allowed: Tensor, keep: int) -> Any:
        return original(importance, torch.ones_like(allowed), keep)

    with mock.patch.object(selected, "choose", bad):
        yield card("dma")


@plant
def positions_restart_in_cache() -> Iterator[Card]:
    original = state.arrivals

    def bad(x: Tensor, call: Call, seen: Tensor | None) -> Any:
        positions, real, after = original(x, call, seen)
        return positions - (0 if seen is None else seen[:, None]), real, after

    from regard.layers import attention

    with mock.patch.object(attention, "arrivals", bad):
        yield card("softmax")


@plant
def graph_break() -> Iterator[Card]:
    def bad(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        result = attend(q, k, v, call, Scored())
        return result if bool(result.output.sum() > -1e30) else Result(result.output)

    yield operator("softmax", bad)


@plant
def asserts_instead_of_errors() -> Iterator[Card]:
    def bad(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        assert k.shape[-1] == q.shape[-1]
        return attend(q, k, v, call, Scored())

    yield operator("softmax", bad)


@plant
def last_tile_forgotten() -> Iterator[Card]:
    def fewer(*args: Any) -> Any:
        *most, last = tiling.plan_tiles(*args)
        return [*most, last.tiles(0, last.count - 1)] if last.count > 1 else most or [last]

    with mock.patch.object(unit, "plan_tiles", fewer):
        yield card("softmax")


@plant
def splits_forget_a_bias() -> Iterator[Card]:
    def bad(*args: Any) -> Any:
        return decoding.run_splits(*args[:4], replace(args[4], key_bias=None), *args[5:])

    with mock.patch.object(scored, "run_splits", bad):
        yield card("dma")


@plant
def foreign_pattern_accepted() -> Iterator[Card]:
    good = card("softmax")
    yield replace(good, patterns=("noncausal self", "noncausal cross"))


@plant
def excuse_that_passes() -> Iterator[Card]:
    yield replace(card("softmax"), gaps={"shapes": "claimed to fail"})


def caught(entry: Card) -> list[str]:
    """Names of the checks that fail, slow ones left out."""
    found = []
    for name in checks_for(entry):
        if CHECKS[name].slow:
            continue
        try:
            run_check(entry, name)
        except Exception:  # a caught bug may fail in any way
            found.append(name)
    return found


@pytest.mark.parametrize("name", PLANTS)
def test_mutant_is_caught(name: str) -> None:
    with PLANTS[name]() as entry:
        found = caught(entry)
    assert found, f"the contract does not see {name}"


def test_the_unmutated_are_clean() -> None:
    """The checks do not fail by themselves: the originals of all mutants pass."""
    for name in ("softmax", "uniform", "sliding_window"):
        assert not caught(card(name))
    assert isinstance(card("softmax").example, Example)
