"""The report of an evaluation: what plans do to a model's quality, cache and speed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from regard.report.evaluation_record import Evaluation, read_evaluation
from regard.report.frontier import entries_of, frontier, shown
from regard.report.page import page, write_page
from regard.report.units import amount, percent, short_percent

NEARLY = 0.95  # of the untouched model's accuracy counts as kept


def evaluation_html(evaluation: Mapping[str, Any]) -> str:
    """One self-contained HTML page of an evaluation of schema "regard.evaluation/1".

    Raises:
        ArgumentError: another schema, or a field that is missing or of the wrong kind.
    """
    read = read_evaluation(evaluation)
    entries = entries_of(read.rows)
    return page(
        "evaluation.html.j2",
        {
            "title": f"Plans on {read.subject.name}",
            **shown(read, entries),
            "finding": _finding(read),
            "facts": _facts(read),
            "charts": [
                (length, task, frontier([e for e in entries if e.row.length == length], task))
                for length in read.lengths
                for task in read.tasks
                if read.at(length)[0].scores[task].kind == "accuracy"
            ],
        },
    )


def write_evaluation(evaluation: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the page of an evaluation to a file, whole or not at all.

    Raises:
        ArgumentError: as `evaluation_html`; or the path is not a file in an existing folder.
    """
    write_page(evaluation_html(evaluation), path)


def _finding(read: Evaluation) -> str:
    """What was found at the longest length, in numbers."""
    dense, *others = read.at(max(read.lengths))
    sentences = []
    for task, score in dense.scores.items():
        if score.kind != "accuracy" or score.value is None:
            continue
        if task in dense.at_chance:
            sentences.append(f"The untouched model is at chance at {task}.")
            continue
        kept = [r for r in others if (r.scores[task].value or 0.0) >= NEARLY * score.value]
        kept.sort(key=lambda row: row.cache_bytes)
        said = f"On {task} at {dense.length:,} tokens the untouched model scores "
        said += f"{percent(score.value)}; {len(kept) or 'none'} of {len(others)} "
        said += f"{'plan keeps' if len(others) == 1 else 'plans keep'} 95\u202f% of that"
        if kept:
            least = kept[0]
            share = short_percent(least.budget)
            said += f", {least.label} with the smallest cache: {share} of the bytes"
        sentences.append(said + ".")
    return " ".join(sentences) or "Only perplexity was measured."


def _facts(read: Evaluation) -> list[tuple[str, str]]:
    """The setting in a few numbers."""
    subject = read.subject
    facts = [
        ("model", subject.architecture),
        ("parameters", amount(subject.parameters)),
        ("numbers", subject.dtype),
        ("tokens", ", ".join(f"{length:,}" for length in read.lengths)),
    ]
    needles = [options for task, options in read.tasks.items() if task == "needle"]
    facts += [("questions", asked(o["examples"], bool(o.get("later")))) for o in needles]
    return [*facts, ("seed", str(read.seed))]


def asked(questions: int, later: bool) -> str:
    """How many questions are asked, and where."""
    return f"{questions}, after the prompt" if later else str(questions)
