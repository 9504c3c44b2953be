"""Checks that what cannot be served is refused by a typed error, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from regard.core.call import Call
from regard.core.card import Card
from regard.core.errors import ArgumentError, RegardError
from regard.core.mask import Causal
from regard.testing.subject import Subject


def _refuses(what: str, action: Callable[[], Any], kind: type[Exception] = RegardError) -> None:
    try:
        action()
    except kind:
        return
    except Exception as other:
        raise AssertionError(
            f"{what}: {type(other).__name__} instead of {kind.__name__}: {other}"
        ) from other
    raise AssertionError(f"{what}: accepted")


def bad_input(card: Card) -> None:
    """Wrong dimensions, widths, dtypes, masks and paddings raise ArgumentError."""
    subject = Subject(card, card.patterns[0])
    inputs = subject.inputs()
    m = inputs[-1].shape[-2]

    def run(changed: list[Any], call: Any = None) -> Callable[[], Any]:
        return lambda: subject.run(changed, call)

    for index in range(len(inputs)):
        others = inputs[:index], inputs[index + 1 :]
        _refuses(
            "3 dimensions too few",
            run([*others[0], inputs[index][0, 0], *others[1]]),
            ArgumentError,
        )
        _refuses("integers", run([*others[0], inputs[index].long(), *others[1]]), ArgumentError)
        _refuses("a list", run([*others[0], [1.0], *others[1]]), ArgumentError)
    if card.kind == "operator":
        q, k, v = inputs
        _refuses("k of another width", run([q, k[..., :-1], v]), ArgumentError)
        _refuses("fewer values than keys", run([q, k, v[:, :, :-1]]), ArgumentError)
        _refuses("another batch", run([q, k[:1], v[:1]]), ArgumentError)
        _refuses("3 key heads for 4", run([q, k[:, :3], v[:, :3]]), ArgumentError)
        _refuses("another dtype", run([q, k.float(), v]), ArgumentError)
    else:
        _refuses("another width", run([x[..., :-1] for x in inputs]), ArgumentError)
    call = subject.call()
    _refuses("a tensor as mask", run(inputs, call.but(mask=torch.ones(m, m))), ArgumentError)
    _refuses("floating padding", run(inputs, call.but(padding=torch.ones(2, m))), RegardError)
    short = torch.ones(2, m - 1, dtype=torch.bool)
    _refuses("padding of another length", run(inputs, call.but(padding=short)), RegardError)
    _refuses("something else as call", run(inputs, {"mask": None}), ArgumentError)


def foreign_patterns(card: Card) -> None:
    """Patterns that the card does not claim are refused, not computed wrongly."""
    for causal, cross in ((True, False), (False, False), (False, True), (True, True)):
        pattern = f"{'causal' if causal else 'noncausal'} {'cross' if cross else 'self'}"
        if pattern in card.patterns or (cross and card.kind == "operator"):
            continue
        host = Subject(card, card.patterns[0])
        call = host.call().but(mask=Causal() if causal else None)
        if not cross:
            own = Subject(card, card.patterns[0]).inputs()
            _refuses(pattern, lambda o=own, c=call, h=host: h.run(o, c))
        else:
            _cross_refused(host, call, pattern)


def _cross_refused(host: Subject, call: Call, pattern: str) -> None:
    x = host.inputs()[0]
    context = torch.randn_like(x)[:, :-1]
    try:
        host.built(x, call, context=context)
    except (RegardError, TypeError):
        return
    raise AssertionError(f"{pattern}: accepted")
