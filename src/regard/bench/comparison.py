"""The comparison: one row per mechanism, from the trials at its best learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from regard.bench.machine import Hardware, Versions, hardware, versions
from regard.bench.record import Record
from regard.bench.spec import HYBRID, Spec
from regard.bench.study import Study
from regard.bench.trial import Point, Share, Trial
from regard.core.card import Card
from regard.core.catalog import card
from regard.tasks.task import Task


class Citation(Record):
    """A paper behind a mechanism."""

    title: str
    arxiv: str
    year: int
    url: str


class Curve(Record):
    """The learning curve of one seed."""

    seed: NonNegativeInt
    points: tuple[Point, ...]


class Row(Record):
    """One mechanism at the learning rate with the best mean validation accuracy.

    lrs: mean validation accuracy of each rate tried. accuracy_mean, accuracy_std: test accuracy
    over seeds (sample deviation; None of one seed), `accuracies` seed by seed. flops_total: of
    training, mean over seeds. state_bytes: per sequence after the task's length, None where nothing
    decodes. steps_to_99: steps until the last of the seeds reached 99 % validation accuracy, None
    if one never did. diverged: seeds that ended in a loss that is not finite.
    """

    label: str
    mechanism: str
    options: dict[str, Any]
    family: str
    citations: tuple[Citation, ...]
    summary: str
    lr: float
    lrs: dict[str, Share]
    accuracy_mean: Share
    accuracy_std: NonNegativeFloat | None
    accuracies: tuple[Share, ...]
    parameters: NonNegativeInt
    state_bytes: NonNegativeInt | None
    flops_total: NonNegativeInt
    flops_per_step: NonNegativeInt
    steps_to_99: NonNegativeInt | None
    diverged: NonNegativeInt
    curves: tuple[Curve, ...]


class Comparison(Record):
    """Mechanisms side by side on one task.

    seconds: time that all its trials took, in earlier runs too. notes: what a reader must know,
    such as trials made with other versions.
    """

    format: Literal["regard.comparison/1"] = Field(default="regard.comparison/1", alias="schema")
    task: dict[str, Any]
    chance: Share
    rows: tuple[Row, ...]
    hardware: Hardware
    versions: Versions
    seconds: float
    command: str
    notes: tuple[str, ...] = ()


def compared(study: Study, task: Task, trials: Sequence[Trial], command: str) -> Comparison:
    """The comparison of a study whose trials are all there."""
    rows = tuple(
        _row(spec, [trial for trial in trials if trial.config.mechanism == spec])
        for spec in study.mechanisms
    )
    return Comparison(
        task={"name": task.name, **task.describe()},
        chance=task.chance,
        rows=rows,
        hardware=hardware(),
        versions=versions(),
        seconds=sum(trial.seconds for trial in trials),
        command=command,
        notes=_notes(trials),
    )


def _row(spec: Spec, trials: list[Trial]) -> Row:
    by_rate: dict[float, list[Trial]] = {}
    for trial in trials:
        by_rate.setdefault(trial.config.lr, []).append(trial)
    valid = {lr: fmean(t.valid_accuracy for t in group) for lr, group in by_rate.items()}
    cost = {lr: fmean(t.flops_total for t in group) for lr, group in by_rate.items()}
    best = max(valid, key=lambda lr: (valid[lr], -cost[lr]))
    chosen, entries = by_rate[best], _cards(spec, trials[0].config.network.layers)
    accuracies = tuple(trial.test_accuracy for trial in chosen)
    reached = [trial.steps_to_solve for trial in chosen]
    return Row(
        label=spec.label,
        mechanism=spec.name,
        options=spec.options,
        family=entries[0].family if len(entries) == 1 else HYBRID,
        citations=tuple(dict.fromkeys(paper for entry in entries for paper in citations(entry))),
        summary="; ".join(entry.summary for entry in entries),
        lr=best,
        lrs={f"{lr:g}": accuracy for lr, accuracy in sorted(valid.items())},
        accuracy_mean=fmean(accuracies),
        accuracy_std=stdev(accuracies) if len(accuracies) > 1 else None,
        accuracies=accuracies,
        parameters=chosen[0].parameters,
        state_bytes=chosen[0].state_bytes,
        flops_total=round(cost[best]),
        flops_per_step=chosen[0].flops_per_step,
        steps_to_99=max((step for step in reached if step), default=None) if all(reached) else None,
        diverged=sum(trial.status == "diverged" for trial in chosen),
        curves=tuple(Curve(seed=trial.seed, points=trial.curve) for trial in chosen),
    )


def _cards(spec: Spec, layers: int) -> list[Card]:
    """The cards of the mechanisms in so many layers, each once."""
    return [card(name) for name in dict.fromkeys(part.name for part in spec.over(layers))]


def citations(entry: Card) -> tuple[Citation, ...]:
    """The papers of a card as records."""
    return tuple(
        Citation(title=paper.title, arxiv=paper.arxiv, year=paper.year, url=paper.url)
        for paper in entry.papers
    )


def _notes(trials: Sequence[Trial]) -> tuple[str, ...]:
    """Differences between the trials' origins and this process, with their counts."""
    now, here = versions().plain(), hardware().plain()
    found: dict[str, int] = {}
    for trial in trials:
        for name, had in trial.versions.plain().items():
            if had != now[name]:
                text = f"made with {name} {had}, now {now[name]}"
                found[text] = found.get(text, 0) + 1
        for name in ("processor", "threads"):
            had = trial.hardware.plain()[name]
            if had != here[name]:
                text = f"made with {name} {had}, now {here[name]}"
                found[text] = found.get(text, 0) + 1
    return tuple(f"{count} of {len(trials)} trials were {text}" for text, count in found.items())
