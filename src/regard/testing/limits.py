"""Checks of agreement: limits that coincide with another mechanism, and forms of one mechanism."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard.build import create
from regard.core.card import Card, Limit, Pattern
from regard.core.catalog import card as find
from regard.testing.compare import close
from regard.testing.subject import Subject


def limits(card: Card) -> None:
    """Every claimed limit coincides with the other mechanism, outputs and input gradients alike."""
    for limit in card.limits:
        other = find(limit.other)
        shared: list[Pattern] = [
            p for p in card.patterns if p in (limit.patterns or other.patterns)
        ]
        assert shared, f"no pattern in common with {limit.other}"
        for pattern in shared:
            _coincides(card, other, limit, pattern)


def _coincides(card: Card, other: Card, limit: Limit, pattern: Pattern) -> None:
    ours = Subject(card, pattern, options=dict(limit.options))
    theirs = Subject(
        _alike(other, card), pattern, size=ours.size, options=dict(limit.other_options)
    )
    if limit.prepare is not None:
        limit.prepare(ours.built)
    if isinstance(theirs.built, nn.Module) and isinstance(ours.built, nn.Module):
        state = ours.built.state_dict()
        theirs.built.load_state_dict(dict(limit.weights(state)) if limit.weights else state)
    inputs = ours.inputs()
    got, got_gradients = with_gradients(ours, inputs, {})
    expected, expected_gradients = with_gradients(theirs, inputs, dict(limit.other_call))
    what = f"limit {limit.other}{dict(limit.options)}, {pattern}"
    close(got, expected, what)
    pairs = list(zip(got_gradients, expected_gradients, strict=False))[: len(inputs)]
    for index, (a, b) in enumerate(pairs):
        close(a, b, f"{what}, gradient of input {index}", 1e-8)


def _alike(other: Card, card: Card) -> Card:
    """The other card on our example's sizes; an operator beside a layer stands in its own layer."""
    example = replace(card.example, options={}, sized=None)
    if card.kind == "layer" and other.kind == "operator":
        return replace(other, example=example, kind="layer", build=partial(create, other.name))
    return replace(other, example=example)


def with_gradients(
    subject: Subject, inputs: list[Tensor], changes: dict[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    """Output, and the gradients of inputs and parameters (zeros where there is none)."""
    fresh = [x.detach().clone().requires_grad_() for x in inputs]
    out = subject.run(fresh, subject.call(**changes))
    own = list(subject.built.parameters()) if isinstance(subject.built, nn.Module) else []
    given = torch.autograd.grad(out.sin().sum(), [*fresh, *own], allow_unused=True)
    return out, [
        torch.zeros_like(x) if g is None else g for g, x in zip(given, [*fresh, *own], strict=True)
    ]


def forms(card: Card) -> None:
    """Every form gives the same outputs and gradients as the first, which is the definition."""
    assert card.forms is not None
    option, values = card.forms
    for pattern in card.patterns:
        inputs = Subject(card, pattern).inputs()
        first, first_gradients = with_gradients(
            Subject(card, pattern, options={option: values[0]}), inputs, {}
        )
        for value in values[1:]:
            got, gradients = with_gradients(
                Subject(card, pattern, options={option: value}), inputs, {}
            )
            close(got, first, f"{pattern}, {option}={value} against {values[0]}")
            for index, (a, b) in enumerate(zip(gradients, first_gradients, strict=True)):
                close(a, b, f"{pattern}, {option}={value}, gradient of input {index}", 1e-8)
