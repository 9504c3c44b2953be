"""The list of checks, which of them apply to a card, and the rule for excuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from regard.core.card import Card
from regard.testing import behaviour, decoding, executors, limits, masking, numerics, refusal


@dataclass(frozen=True)
class Check:
    """One clause of the contract: `run` raises AssertionError (or any error) where it is broken.

    slow: it takes many seconds for one card.
    """

    run: Callable[[Card], None]
    applies: Callable[[Card], bool] = lambda card: True
    slow: bool = False


def _sequence(card: Card) -> bool:
    return 1 in card.grids


def _decodes(card: Card) -> bool:
    return card.causal and card.cost.state != "none"


CHECKS: dict[str, Check] = {
    "shapes": Check(behaviour.shapes),
    "batch_rows_independent": Check(behaviour.batch_rows_independent),
    "grouped_heads": Check(behaviour.grouped_heads, lambda c: c.kind == "operator"),
    "lengths": Check(behaviour.lengths, _sequence),
    "strides": Check(behaviour.strides),
    "state_dict": Check(behaviour.state_dict),
    "future_invisible": Check(masking.future_invisible, lambda c: c.causal),
    "past_visible": Check(masking.past_visible),
    "mask_honoured": Check(masking.mask_honoured),
    "scale_honoured": Check(masking.scale_honoured),
    "padding_content": Check(masking.padding_content),
    "left_right_padding": Check(masking.left_right_padding, _sequence),
    "empty_rows": Check(masking.empty_rows),
    "gradients": Check(numerics.gradients),
    "precision": Check(numerics.precision),
    "double_throughout": Check(numerics.double_throughout),
    "huge_logits": Check(numerics.huge_logits),
    "compiles": Check(numerics.compiles),
    "cost": Check(numerics.cost),
    "limits": Check(limits.limits, lambda c: bool(c.limits)),
    "executors": Check(executors.executors),
    "flex": Check(executors.flex, slow=True),
    "forms": Check(limits.forms, lambda c: c.forms is not None),
    "decode": Check(decoding.decode, _decodes),
    "decode_padding": Check(decoding.decode_padding, _decodes),
    "state_size": Check(decoding.state_size, _decodes),
    "bottom_right": Check(
        decoding.bottom_right,
        lambda c: "causal cross" in c.patterns and c.causal and c.kind == "operator",
    ),
    "bad_input": Check(refusal.bad_input),
    "foreign_patterns": Check(refusal.foreign_patterns),
}


def checks_for(card: Card) -> list[str]:
    """Names of the checks that apply to a card."""
    return [name for name, check in CHECKS.items() if check.applies(card)]


class ExcuseError(AssertionError):
    """A gap names no check, or excuses one that passes."""


def run_check(card: Card, name: str) -> None:
    """Run one check. A check excused by `card.gaps` must fail; one that passes is an error."""
    if name not in card.gaps:
        CHECKS[name].run(card)
        return
    try:
        CHECKS[name].run(card)
    except Exception:  # any failure at all justifies the excuse
        return
    raise ExcuseError(f"{card.name}: {name} passes; drop the gap {card.gaps[name]!r}")
