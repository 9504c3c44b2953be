"""Measuring every head of a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, cast

import torch

from regard.atlases.examples import Strongest
from regard.atlases.piece import Part, Piece
from regard.atlases.record import Atlas, Row
from regard.atlases.watching import watch
from regard.core.catalog import probe, probe_cards
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mode import in_mode
from regard.core.passage import Passage, passage_of
from regard.core.probe import Experiment, Probe, Reading
from regard.core.scene import Scene

READINGS = "readings"
ALL = "all"


def atlas(
    model: Any,
    passages: Iterable[Passage | Mapping[str, Any]],
    probes: str | Sequence[str | Probe] = READINGS,
    *,
    examples: int = 3,
    plan: Any = None,
    progress: Callable[[float, str], None] | None = None,
) -> Atlas:
    """Measure every attention head of a model that a host can reach.

    passages: what to show it, as Passage or as keyword arguments of one forward each; `input_ids`
    among those are the tokens that copying probes compare. probes: "readings" (those that one
    forward serves), "all", or which ones, by name or built with options. examples: of the strongest
    queries kept per head. plan: what the model is to do meanwhile; its atlas can be compared with
    that of the untouched one. progress: called with the share that is done and what is measured.

    A probe that a model or its passages cannot serve leaves its reason in the atlas's `notes`; the
    others are kept.

    Raises:
        ArgumentError: no passage, or one of padding or of one token.
        UnknownNameError: a probe no card names.
        UnsupportedError: a model no host knows or whose attention is not reached; a plan is in
            force already; no probe could be served.
    """
    survey = Survey.of(model, passages, probes, examples=examples, plan=plan)
    began, pieces = time.perf_counter(), []
    for index, part in enumerate(survey.parts):
        if progress is not None:
            progress(index / len(survey.parts), part.label)
        pieces.append(survey.measured(part))
    if progress is not None:
        progress(1.0, "")
    return survey.atlas(pieces, time.perf_counter() - began)


@dataclass(frozen=True, eq=False)
class Survey:
    """An atlas to be made, in parts that do not depend on each other. examples: kept per head."""

    scene: Scene
    readings: Mapping[str, Reading]
    experiments: Mapping[str, Experiment]
    examples: int

    @classmethod
    def of(
        cls,
        model: Any,
        passages: Iterable[Passage | Mapping[str, Any]],
        probes: str | Sequence[str | Probe] = READINGS,
        *,
        examples: int = 3,
        plan: Any = None,
    ) -> Survey:
        """What `atlas` will measure; see there for arguments and errors."""
        given = tuple(passage_of(p) for p in passages)
        if not given:
            raise ArgumentError("passages", "at least one", 0)
        chosen = _chosen(probes)
        if examples < 0:
            raise ArgumentError("examples", "0 or more", examples)
        readings = {name: cast(Reading, p) for name, p in chosen.items() if hasattr(p, "begin")}
        rest = {name: cast(Experiment, p) for name, p in chosen.items() if name not in readings}
        scene = Scene.of(model, given, None if plan is None else plan.resolve(model).table)
        return cls(scene, readings, rest, examples)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What has to be measured: readings passage by passage, then every experiment."""
        passages = range(len(self.scene.passages)) if self.readings else ()
        return (*(Part(passage=i) for i in passages), *(Part(name) for name in self.experiments))

    def measured(self, part: Part) -> Piece:
        """What is found in one part."""
        piece = Piece(Strongest(self.examples))
        with in_mode(self.scene.model, False), self.scene.planned():
            if part.experiment:
                self._experiment(part.experiment, piece)
            else:
                watch(self.scene, self.readings, part.passage, piece)
        return piece

    def _experiment(self, name: str, piece: Piece) -> None:
        """Run one experiment; what it cannot serve becomes a note."""
        try:
            for passage, site, finding in self.experiments[name].run(self.scene):
                piece.gathered.add(site, finding, self.scene.domain(passage))
        except (UnsupportedError, ArgumentError) as error:
            piece.notes[name] = str(error)

    def atlas(self, pieces: Iterable[Piece], seconds: float) -> Atlas:
        """The atlas of all pieces, in the order of their parts.

        Raises:
            UnsupportedError: nothing was found.
        """
        whole = Piece(Strongest(self.examples))
        for piece in pieces:
            whole.merge(piece)
        rows = (*whole.gathered.metrics.rows(), *whole.gathered.layers.rows())
        if not rows:
            raise UnsupportedError("atlas", "; ".join(f"{k}: {v}" for k, v in whole.notes.items()))
        return Atlas(
            type(self.scene.model).__name__,
            rows,
            whole.gathered.profiles.stacked(),
            notes=whole.notes,
            meanings=_meanings(rows),
            examples=whole.strongest.examples(),
            about=_about(self.scene.passages, seconds),
        )


def _chosen(probes: str | Sequence[str | Probe]) -> dict[str, Probe]:
    """The probes that are asked for, by name."""
    if isinstance(probes, str):
        if probes not in (READINGS, ALL):
            raise ArgumentError("probes", f"{READINGS!r}, {ALL!r} or a sequence of probes", probes)
        found = {n: c for n, c in probe_cards().items() if probes == ALL or c.kind == "reading"}
        return {name: card.build() for name, card in found.items()}
    names = {card.build: name for name, card in probe_cards().items()}
    chosen = {
        p if isinstance(p, str) else names.get(type(p), type(p).__name__): p
        if not isinstance(p, str)
        else probe(p).build()
        for p in probes
    }
    if not chosen or len(chosen) < len(probes):
        raise ArgumentError("probes", "at least one, each once", list(probes))
    return chosen


def _meanings(rows: Iterable[Row]) -> dict[str, str]:
    """What each metric means, from the cards of the library."""
    known = {
        metric: meaning
        for card in probe_cards().values()
        for metric, meaning in {**card.metrics, **card.layers}.items()
    }
    names = dict.fromkeys(row.metric for row in rows)
    return {name: known.get(name.partition("@")[0], "") for name in names}


def _about(passages: Sequence[Passage], seconds: float) -> dict[str, Any]:
    """Under which circumstances an atlas was made."""
    tokens = [p.tokens.numel() for p in passages if p.tokens is not None]
    return {
        "passages": len(passages),
        "tokens": sum(tokens),
        "seconds": round(seconds, 2),
        "torch": torch.__version__,
        "regard": version("regard"),
    }
