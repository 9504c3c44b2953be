"""Types of heads, by simple rules on their metrics; a head may be of several types, or of none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regard.report.towers import Tower


@dataclass(frozen=True)
class Bound:
    """A metric must reach a number, or stay below it."""

    metric: str
    number: float
    below: bool = False

    @property
    def text(self) -> str:
        """As it is told."""
        return f"{self.metric} {'<' if self.below else '≥'} {self.number:g}"


@dataclass(frozen=True)
class Rule:
    """Heads of this type keep all of these bounds."""

    name: str
    says: str
    bounds: tuple[Bound, ...]

    @property
    def text(self) -> str:
        """The rule as it is told."""
        return " and ".join(bound.text for bound in self.bounds)

    def missing(self, metrics: Mapping[str, object]) -> list[str]:
        """Metrics without which it cannot be judged."""
        return [bound.metric for bound in self.bounds if bound.metric not in metrics]

    def holds(self, tower: Tower) -> NDArray[np.bool_]:
        """Of which heads (layers, heads) it is true; what was not measured is not."""
        found = np.ones((tower.layers, tower.heads), dtype=bool)
        for bound in self.bounds:
            values = tower.values[bound.metric]
            with np.errstate(invalid="ignore"):
                kept = values < bound.number if bound.below else values >= bound.number
            found &= kept
        return found


RULES: tuple[Rule, ...] = (
    Rule("sink", "parks on the first token", (Bound("sink_first", 0.5),)),
    Rule("previous token", "reads the token before", (Bound("previous_token", 0.4),)),
    Rule("induction", "reads what followed the same token before", (Bound("induction", 0.3),)),
    Rule("retrieval", "copies from far back what is asked for", (Bound("retrieval", 0.1),)),
    Rule("uniform", "reads all tokens nearly alike", (Bound("entropy_share", 0.9),)),
    Rule(
        "local",
        "reads near tokens, and many of them",
        (Bound("local", 0.8), Bound("previous_token", 0.4, below=True)),
    ),
    Rule(
        "global",
        "reads far and wide",
        (
            Bound("local", 0.3, below=True),
            Bound("sink_first", 0.5, below=True),
            Bound("entropy_share", 0.5),
            Bound("entropy_share", 0.9, below=True),
        ),
    ),
)


@dataclass(frozen=True)
class Type:
    """A rule and the heads of one tower it is true of; `lacks`: metrics that were not measured."""

    rule: Rule
    heads: tuple[tuple[int, int], ...]
    lacks: tuple[str, ...]


def head_types(tower: Tower, rules: Sequence[Rule] = RULES) -> list[Type]:
    """Every rule with the heads it is true of."""
    found = []
    for rule in rules:
        lacks = tuple(dict.fromkeys(rule.missing(tower.values)))
        places = [] if lacks else np.argwhere(rule.holds(tower)).tolist()
        found.append(Type(rule, tuple((layer, head) for layer, head in places), lacks))
    return found
