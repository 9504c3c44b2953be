"""The card: what a method says about itself. Tests, tables, citations and names all come from
cards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from regard.core.mask import Mask

Kind = Literal["operator", "layer"]
Family = Literal["scored", "recurrent", "selected", "pooled", "free"]
Pattern = Literal["noncausal self", "causal self", "noncausal cross", "causal cross"]
State = Literal["keys", "constant", "none"]


@dataclass(frozen=True)
class Paper:
    """A source: arXiv id (or another identifier, such as a DOI), title and year."""

    arxiv: str
    title: str
    year: int

    @property
    def url(self) -> str:
        """Where to read it."""
        return f"https://arxiv.org/abs/{self.arxiv}"


@dataclass(frozen=True)
class Cost:
    """Claims that are measured by the contract.

    time: exponent of N in the counted operations of one forward at long N. state: what decoding
    keeps: "keys" (grows with the tokens seen, perhaps trimmed), "constant" (fixed size), "none"
    (this method does not decode token by token).
    """

    time: float
    state: State


@dataclass(frozen=True)
class Example:
    """The smallest telling arguments: module width and heads, options of the method, tokens or grid
    to run on.

    length: tokens of a 1-D input; grid: side lengths of a 2-D or 3-D one. sized: options that
    depend on the size of the input, from its grid (or (length,)).
    """

    dim: int = 32
    heads: int = 4
    length: int = 12
    grid: tuple[int, ...] | None = None
    prefix: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    sized: Callable[[tuple[int, ...]], Mapping[str, Any]] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the example input, prefix included."""
        if self.grid is None:
            return self.length
        size = 1
        for side in self.grid:
            size *= side
        return size + self.prefix


@dataclass(frozen=True)
class Limit:
    """With `options`, this method must coincide exactly with card `other` built with
    `other_options`.

    other_call: call fields the other is given instead of ours. weights: maps this module's state
    dict to the other's (None: the names agree). patterns: where the limit holds (None: wherever
    both do).
    """

    options: Mapping[str, Any]
    other: str
    other_options: Mapping[str, Any] = field(default_factory=dict)
    other_call: Mapping[str, Any] = field(default_factory=dict)
    weights: Callable[[Any], Mapping[str, Any]] | None = None
    prepare: Callable[[Any], None] | None = None
    patterns: tuple[Pattern, ...] | None = None


@dataclass(frozen=True)
class Golden:
    """Agreement with the authors' code.

    file: name in the goldens folder. replay: runs our method on one case and returns outputs under
    the authors' names.
    leaves: outputs of the file that are not reproduced, each with the reason. only: cases of the
    file that are this method's (None: all).
    """

    file: str
    replay: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    source: str
    commit: str
    leaves: Mapping[str, str] = field(default_factory=dict)
    only: Callable[[Mapping[str, Any]], bool] | None = None


@dataclass(frozen=True)
class Claim:
    """What the paper promises, at pocket scale, and the command that shows it."""

    text: str
    command: str


class Documented:
    """What the file of a card's method says of it."""

    build: Any

    @property
    def doc(self) -> str:
        """The file's module docstring: the idea, and the formula."""
        module = inspect.getmodule(self.build)
        return inspect.cleandoc(module.__doc__ or "") if module else ""

    @property
    def summary(self) -> str:
        """Its first sentence."""
        return " ".join(self.doc.split("\n\n")[0].split())


@dataclass(frozen=True)
class Card(Documented):
    """One method. Its `name` is the paper's short name in snake_case, unique, and the key in plans,
    tables and commands.

    build: for an operator a function (q, k, v, call, *, options) -> Result, or a module class
    constructed with (heads, head_dim, **options) and called with (q, k, v, call); for a layer a
    module class constructed with (dim, heads, **options) and called with (x, call). forms: option
    values that must agree, as (option, values).
    convert: maps the authors' (config, state dict) to a module of ours, so that released weights
    load.
    mask: for operators with a static pattern, the mask of given options; caches drop what it says
    is no longer alive.
    gaps: contract check -> reason why it does not hold; an excuse that starts to pass fails.
    """

    name: str
    kind: Kind
    build: Callable[..., Any]
    papers: tuple[Paper, ...]
    family: Family
    patterns: tuple[Pattern, ...]
    cost: Cost
    claim: Claim
    grids: tuple[int, ...] = (1,)
    example: Example = Example()
    limits: tuple[Limit, ...] = ()
    forms: tuple[str, tuple[str, ...]] | None = None
    goldens: tuple[Golden, ...] = ()
    convert: Callable[[Mapping[str, Any], Mapping[str, Any]], Any] | None = None
    mask: Callable[..., Mask] | None = None
    gaps: Mapping[str, str] = field(default_factory=dict)
    deviations: tuple[str, ...] = ()

    @property
    def evidence(self) -> str:
        """Golden (agrees with the authors' code) > exact (a limit or agreeing forms) > paper (the
        text alone).
        """
        if self.goldens:
            return "golden"
        return "exact" if self.limits or self.forms else "paper"

    @property
    def causal(self) -> bool:
        """Whether it serves causal self-attention."""
        return "causal self" in self.patterns

    @property
    def carries_state(self) -> bool:
        """Whether the operator itself takes and returns a decode state, instead of reading cached
        keys.
        """
        return (
            self.kind == "operator"
            and "state" in inspect.signature(operator_call(self.build)).parameters
        )

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """Options of the method by name, with their defaults and annotations."""
        fixed = {"self", "q", "k", "v", "x", "call", "state", "dim", "heads", "head_dim"}
        return {
            name: p
            for name, p in inspect.signature(self.build).parameters.items()
            if name not in fixed
        }


def operator_call(build: Callable[..., Any]) -> Callable[..., Any]:
    """What is called with q, k, v: the function itself, or the forward of an operator module."""
    return getattr(build, "forward", build)


class Named(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str: ...


Entry = TypeVar("Entry", bound=Named)


def by_name(cards: Iterable[Entry]) -> dict[str, Entry]:
    """Cards by name; two cards of one name are a bug in the library."""
    table: dict[str, Entry] = {}
    for card in cards:
        if card.name in table:
            raise ValueError(f"two cards are called {card.name!r}")
        table[card.name] = card
    return table
