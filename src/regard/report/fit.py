"""The report of a fit: the plan for a budget, why each key head got what it got, and the proof."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from regard.core.catalog import probe_cards
from regard.report.evaluation import asked
from regard.report.evaluation_record import Row
from regard.report.fit_heads import heads_of
from regard.report.fit_record import Fit, read_fit
from regard.report.frontier import (
    BYTES,
    SECONDS,
    Entry,
    entries_of,
    frontier,
    interval_text,
    score_text,
    shown,
)
from regard.report.page import page, write_page
from regard.report.units import duration, percent, short_percent

UNITS = {
    "bytes": "of the cache's bytes",
    "tokens": "of the attended tokens",
    "flops": "of the multiplications of a decoded token",
    "latency": "of the time of a decoded token",
}


def fit_html(fit: Mapping[str, Any]) -> str:
    """One self-contained HTML page of a fit of schema "regard.fit/1".

    Raises:
        ArgumentError: another schema, or a field that is missing or of the wrong kind.
    """
    read = read_fit(fit)
    entries = entries_of(read.evaluation.rows, _family)
    heads = heads_of(read)
    return page(
        "fit.html.j2",
        {
            "title": f"{read.config.task.capitalize()} within {_budget(read)}",
            "fit": read,
            **shown(read.evaluation, entries),
            "finding": _finding(read),
            "facts": _facts(read),
            "charts": _charts(read, entries),
            "heads": heads,
            "meanings": _meanings(read),
            "bars": _bars(read),
            "plan_text": json.dumps(read.plan, indent=1, ensure_ascii=False),
            "settings": _settings(read),
        },
        ("fit.css", "fit.js"),
    )


def write_fit(fit: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the page of a fit to a file, whole or not at all.

    Raises:
        ArgumentError: as `fit_html`; or the path is not a file in an existing folder.
    """
    write_page(fit_html(fit), path)


def _family(label: str) -> str:
    """A label without its budget: "fitted 0.25" is of the family "fitted"."""
    return label.rpartition(" ")[0] or label


def _budget(fit: Fit) -> str:
    config = fit.config
    return f"{short_percent(config.budget)} {UNITS.get(config.unit, f'of {config.unit}')}"


def _charts(fit: Fit, entries: Sequence[Entry]) -> list[tuple[int, list[Any]]]:
    """Per length the quality against bytes and against seconds."""
    return [
        (
            length,
            [
                frontier([e for e in entries if e.row.length == length], fit.config.task, against)
                for against in (BYTES, SECONDS)
            ],
        )
        for length in fit.evaluation.lengths
    ]


def _finding(fit: Fit) -> str:
    """What was found at the longest length, in numbers."""
    task, length = fit.config.task, max(fit.evaluation.lengths)
    dense, own, *others = fit.evaluation.at(length)
    same = [row for row in others if row.label.rpartition(" ")[2] == own.label.rpartition(" ")[2]]
    counted = own.scores[task].kind == "accuracy"
    verb, where = ("scores", f" on {task}") if counted else ("has perplexity", "")
    said = f"With {_budget(fit)}, the fitted plan {verb} {_scored(own, task)}{where} at "
    said += f"{length:,} tokens; the untouched model {verb} {_scored(dense, task)}"
    if (part := _kept(dense, own, task)) is not None:
        said += f", of which the plan keeps {percent(part)}"
    if not same:
        return f"{said}."
    rest = "; ".join(f"{_family(row.label)} {_scored(row, task)}" for row in same)
    return f"{said}. At the same cost: {rest}."


def _scored(row: Row, task: str) -> str:
    score = row.scores[task]
    said = score_text(score.kind, score.value)
    span = interval_text(score.low, score.high)
    return f"{said} ({span})" if span else said


def _kept(dense: Row, own: Row, task: str) -> float | None:
    """The part of the untouched model's accuracy that a plan keeps."""
    whole, left = dense.scores[task], own.scores[task]
    if whole.kind != "accuracy" or not whole.value or left.value is None:
        return None
    return left.value / whole.value


def _facts(fit: Fit) -> list[tuple[str, str]]:
    """The setting in a few numbers."""
    config, subject = fit.config, fit.evaluation.subject
    return [
        ("model", subject.name),
        ("cost of the plan", percent(fit.cost)),
        ("tokens", ", ".join(f"{length:,}" for length in config.lengths)),
        ("examples to learn from", str(config.examples)),
        ("questions to prove it", asked(config.exams, config.later)),
        ("seed", str(config.seed)),
        ("search and proof took", duration(fit.seconds)),
    ]


def _settings(fit: Fit) -> list[tuple[str, str]]:
    """All that was asked, lists with commas."""
    return [
        (name, ", ".join(map(str, value)) if isinstance(value, tuple) else str(value))
        for name, value in fit.config.model_dump(exclude_none=True).items()
    ]


def _meanings(fit: Fit) -> list[tuple[str, str]]:
    """What the metrics of the heads mean, from the cards of the library."""
    known = {name: text for card in probe_cards().values() for name, text in card.metrics.items()}
    names = dict.fromkeys(name for head in fit.groups for name in head.metrics)
    return [(name.replace("_", " "), known[name]) for name in names if name in known]


def _bars(fit: Fit) -> list[tuple[str, float, float]]:
    """Losses to compare: what each is, nats, and its part of the largest."""
    values = {
        "Untouched loss": fit.untouched,
        "Predicted rise": fit.predicted,
    }
    if fit.measured is not None:
        values["Measured rise"] = fit.measured
    most = max(*values.values(), 1e-9)
    return [(name, value, max(0.0, value / most)) for name, value in values.items()]
