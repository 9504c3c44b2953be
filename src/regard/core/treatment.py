r"""Treatments: what a plan can do to chosen heads of a model, as overrides of the places of one
attention call.

    inputs     q, k, v before attention
    scores     `bias` added to q·k s, or `visible`: which keys a query may attend to
    weights    rows of weights, rewritten
    attention  the whole map q, k, v -> o, computed another way
    output     what each head returns
    keep       after the call: which cached keys stay
    removes    sub-layers that are left out

A treatment is a frozen dataclass that overrides the places it needs and nothing else; the places
decide the kernel (a treatment of inputs or output leaves the model's own kernel in place, one of
weights needs the matrix). It never chooses heads: it is given the heads it may touch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from regard.core.card import Claim, Documented, Golden, Paper
from regard.core.moment import Held, Moment, Phase, Site

Sublayer = Literal["attention", "mlp"]
Place = Literal["inputs", "bias", "visible", "weights", "attention", "output", "keep", "removes"]
PLACES: tuple[Place, ...] = (
    "inputs",
    "bias",
    "visible",
    "weights",
    "attention",
    "output",
    "keep",
    "removes",
)


class Treatment:
    """Base of all treatments: every place leaves things as they are."""

    @property
    def neutral(self) -> bool:
        """Whether these parameters change nothing at all; a plan leaves such steps out."""
        return False

    @property
    def watches(self) -> bool:
        """Whether it only looks, and wants to be shown (`Moment.views`) what earlier steps did."""
        return False

    @property
    def serves(self) -> frozenset[Phase]:
        """Phases in which it can act on causal attention; a step that names others is refused."""
        return frozenset(("prefill", "decode"))

    def check(self, site: Site, heads: tuple[int, ...]) -> None:
        """Raise ArgumentError or UnsupportedError unless it can serve this layer's heads."""

    @property
    def removes(self) -> frozenset[Sublayer]:
        """Sub-layers of the block that are not computed at all; their residual passes."""
        return frozenset()

    def inputs(self, at: Moment) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of the same shapes."""
        return at.q, at.k, at.v

    def bias(self, at: Moment) -> Tensor | None:
        """What is added to the scaled scores, broadcastable to (B,h,N,M)."""
        return None

    def visible(self, at: Moment) -> Tensor | None:
        """Boolean, broadcastable to (B,h,N,M): the keys that stay visible, in conjunction with the
        model's own mask.
        """
        return None

    def weights(self, weights: Tensor, at: Moment) -> Tensor:
        """Weights (B,h,N,M) in place of those of softmax."""
        return weights

    def attention(self, at: Moment) -> Tensor | None:
        """The output (B,h,N,E), computed another way; None: as before."""
        return None

    def output(self, output: Tensor, at: Moment) -> Tensor:
        """Output (B,h,N,E) of these heads, before the output projection."""
        return output

    def keep(self, held: Held) -> Tensor | None:
        """Boolean (B,g,M): which keys stay in the cache; None: all."""
        return None


def places_of(build: type[Treatment]) -> tuple[Place, ...]:
    """The places a treatment overrides."""
    return tuple(p for p in PLACES if getattr(build, p) is not getattr(Treatment, p))


@dataclass(frozen=True)
class Trial:
    """Options that act on a tiny model of about thirty tokens: a decoder of three layers with four
    heads over two key heads, or an encoder with four heads. layers: where. length: tokens.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    layers: str = "all"
    model: Literal["decoder", "encoder"] = "decoder"
    length: int = 30


@dataclass(frozen=True)
class Coincides:
    """With `options`, on every head, this treatment must give what `other` does (None: the
    untouched model).
    """

    options: Mapping[str, Any]
    other: str | None = None
    other_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TreatmentCard(Documented):
    """One treatment: its `name` is the paper's short name and its key in plans.

    build: a frozen dataclass derived from Treatment; its fields are the options. example: see
    Trial. neutral: options that must change nothing, bit for bit. limits: exact coincidences.
    convert: maps the authors' (config, state dict) to our options. gaps: contract check -> reason;
    an excuse that starts to pass fails.
    """

    name: str
    build: type[Treatment]
    papers: tuple[Paper, ...]
    claim: Claim
    example: Trial = Trial()
    neutral: Mapping[str, Any] | None = None
    limits: tuple[Coincides, ...] = ()
    goldens: tuple[Golden, ...] = ()
    convert: Callable[[Mapping[str, Any], Mapping[str, Any]], Any] | None = None
    gaps: Mapping[str, str] = field(default_factory=dict)
    deviations: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """What it is, in tables."""
        return "treatment"

    @property
    def places(self) -> tuple[Place, ...]:
        """The places it touches."""
        return places_of(self.build)

    @property
    def evidence(self) -> str:
        """Golden > exact (coincides with something known) > paper."""
        if self.goldens:
            return "golden"
        return "exact" if self.limits or self.neutral is not None else "paper"
