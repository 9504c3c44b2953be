"""Rules: what a group of key heads may be told to do, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from regard.core.errors import ArgumentError
from regard.core.moment import Site
from regard.plan import Plan, Signature, Step

Unit = Literal["bytes", "tokens", "flops", "latency"]
RuleName = Literal["spans", "snapkv"]
VOTERS = 8
"""Last tokens of a prompt that vote, and stay."""
SHARES = (*(2.0**-k for k in range(7, 2, -1)), *(k / 8 for k in range(2, 8)), 15 / 16, 1.0)
"""Parts of the cache that a group of heads may keep."""


@dataclass(frozen=True)
class Rule:
    """A treatment with options (None: the head stays as it is), the share of the tokens that it
    keeps, and how many it keeps at least.
    """

    treatment: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    floor: int = 1

    def kept(self, length: int) -> int:
        """Tokens kept of a prompt of this length."""
        return min(length, max(self.floor, int(length * self.share)))

    def step(self, layers: Any, kv_heads: tuple[int, ...] | None = None) -> Step:
        """The step of a plan that follows it, on some layers and key heads (None: all)."""
        options = dict(self.options)
        return Step(
            treatment=str(self.treatment), options=options, layers=layers, kv_heads=kv_heads
        )

    @property
    def label(self) -> str:
        """How it is called in tables."""
        if self.treatment is None:
            return "dense"
        told = ", ".join(f"{key}={value:.4g}" for key, value in self.options.items())
        return f"{self.treatment}({told})"


@dataclass(frozen=True)
class Group:
    """Query heads that share the keys of one key head."""

    layer: int
    kv_head: int


def rule_of(name: RuleName, share: float, sinks: int = 4) -> Rule:
    """The rule of a family that keeps a share of the tokens: the first `sinks` and the newest ones
    ("spans"), or those that the prompt's last tokens vote for ("snapkv").
    """
    if share == 1:
        return Rule(None)
    if name == "spans":
        return Rule("stream", {"sinks": sinks, "budget": share}, share, sinks + 1)
    return Rule("snapkv", {"window": VOTERS, "budget": share}, share, VOTERS)


def ladder(name: RuleName, shares: Sequence[float] = SHARES, sinks: int = 4) -> tuple[Rule, ...]:
    """The rules of a family at rising shares of the tokens.

    Raises:
        ArgumentError: an unknown family; shares outside (0, 1] or not rising.
    """
    if name not in get_args(RuleName):
        raise ArgumentError("rule", f"one of {', '.join(get_args(RuleName))}", name)
    if not shares or list(shares) != sorted(set(shares)) or not 0 < shares[0] <= shares[-1] <= 1:
        raise ArgumentError("shares", "rising fractions in (0, 1]", tuple(shares))
    return tuple(rule_of(name, share, sinks) for share in shares)


def groups_of(sites: Sequence[Site]) -> tuple[Group, ...]:
    """Every key head of the decoder's layers."""
    return tuple(Group(site.layer, head) for site in sites for head in range(site.kv_heads))


def plan_of(
    groups: Sequence[Group],
    rules: Sequence[Rule],
    choice: NDArray[np.int64],
    *,
    name: str,
    made_for: Signature | None = None,
) -> Plan:
    """The plan in which every group follows its chosen rule; one step per rule and layer set."""
    by_rule: dict[tuple[int, int], list[int]] = {}
    for group, index in zip(groups, choice.tolist(), strict=True):
        if rules[index].treatment is not None:
            by_rule.setdefault((index, group.layer), []).append(group.kv_head)
    merged: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for (index, layer), heads in sorted(by_rule.items()):
        merged.setdefault((index, tuple(heads)), []).append(layer)
    steps = tuple(
        rules[index].step(tuple(layers), heads) for (index, heads), layers in merged.items()
    )
    return Plan(name=name, made_for=made_for, steps=steps)
