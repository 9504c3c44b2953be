"""Measuring every head of a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, cast

import torch

from regard.atlases.examples import Strongest
from regard.atlases.means import Gathered
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
    given = tuple(passage_of(p) for p in passages)
    if not given:
        raise ArgumentError("passages", "at least one", 0)
    chosen = _chosen(probes)
    if examples < 0:
        raise ArgumentError("examples", "0 or more", examples)
    readings = {name: cast(Reading, p) for name, p in chosen.items() if hasattr(p, "begin")}
    rest = {name: cast(Experiment, p) for name, p in chosen.items() if name not in readings}
    scene = Scene.of(model, given, None if plan is None else plan.resolve(model).table)
    notes, began = {}, time.perf_counter()
    strongest = Strongest(examples) if examples else None
    gathered = Gathered()
    with in_mode(model, False), scene.planned():
        if readings:
            _tell(progress, 0.0, "readings")
            gathered = watch(scene, readings, strongest, notes)
        for index, (name, experiment) in enumerate(rest.items()):
            _tell(progress, (index + 1) / (len(rest) + 1), name)
            _experiment(name, experiment, scene, gathered, notes)
    _tell(progress, 1.0, "")
    rows = (*gathered.metrics.rows(), *gathered.layers.rows())
    if not rows:
        raise UnsupportedError("atlas", "; ".join(f"{k}: {v}" for k, v in notes.items()))
    return Atlas(
        type(model).__name__,
        rows,
        gathered.profiles.stacked(),
        notes=notes,
        meanings=_meanings(rows),
        examples=() if strongest is None else strongest.examples(),
        about=_about(given, time.perf_counter() - began),
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


def _experiment(
    name: str, experiment: Experiment, scene: Scene, gathered: Gathered, notes: dict[str, str]
) -> None:
    """Run one experiment; what it cannot serve becomes a note."""
    try:
        for passage, site, finding in experiment.run(scene):
            gathered.add(site, finding, scene.domain(passage))
    except (UnsupportedError, ArgumentError) as error:
        notes[name] = str(error)


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


def _tell(progress: Callable[[float, str], None] | None, share: float, what: str) -> None:
    if progress is not None:
        progress(share, what)
