"""The report of a study: its figures beside what the paper expects, its curves and maps."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from textwrap import dedent
from typing import Any

from regard.core.study import Figure, Outcome, StudyCard
from regard.report.chart import SHAPES
from regard.report.heat import heat
from regard.report.lines import line_chart
from regard.report.page import page, write_page
from regard.report.units import short

SCHEMA = "regard.study/1"


@dataclass(frozen=True)
class StudyRun:
    """One run of a study. options: every field of it; versions, hardware: of the machine that ran
    it; command: repeats it.
    """

    card: StudyCard
    options: Mapping[str, Any]
    outcome: Outcome
    seconds: float
    command: str
    versions: Mapping[str, Any] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """The run as JSON-ready dictionaries; numbers that are not finite are null."""
        return {
            "schema": SCHEMA,
            "study": self.card.name,
            "summary": self.card.summary,
            "claim": self.card.claim.text,
            "papers": [{"title": p.title, "year": p.year, "url": p.url} for p in self.card.papers],
            "options": _jsonable(dict(self.options)),
            "figures": [
                {**_jsonable(asdict(figure)), "holds": figure.holds}
                for figure in self.outcome.figures
            ],
            "curves": [_jsonable(asdict(curve)) for curve in self.outcome.curves],
            "maps": [_jsonable(asdict(picture)) for picture in self.outcome.maps],
            "seconds": round(self.seconds, 2),
            "command": self.command,
            "versions": dict(self.versions),
            "hardware": dict(self.hardware),
        }


def study_html(run: StudyRun) -> str:
    """One self-contained HTML page of a study."""
    card, outcome = run.card, run.outcome
    first, *paragraphs = card.doc.split("\n\n")
    return page(
        "study.html.j2",
        {
            "title": card.name.replace("_", " "),
            "run": run,
            "summary": " ".join(first.split()),
            "paragraphs": [p for p in paragraphs if p.strip()],
            "finding": _finding(outcome),
            "bounds": bounds_text,
            "dedent": dedent,
            "curves": [line_chart((c.title, c.x, c.y), c.lines) for c in outcome.curves],
            "maps": [heat(m.title, m.rows, m.columns, m.values) for m in outcome.maps],
            "shapes": SHAPES,
        },
        ("study.css",),
    )


def write_study(run: StudyRun, path: str | os.PathLike[str]) -> None:
    """Write the page of a study to a file, whole or not at all.

    Raises:
        ArgumentError: the path is not a file in an existing folder.
    """
    write_page(study_html(run), path)


def bounds_text(figure: Figure) -> str:
    """Within which numbers a figure holds."""
    if figure.low is not None and figure.high is not None:
        return f"{short(figure.low)} to {short(figure.high)}"
    if figure.low is not None:
        return f"≥ {short(figure.low)}"
    return f"≤ {short(figure.high)}" if figure.high is not None else "any"


def _finding(outcome: Outcome) -> str:
    kept = sum(figure.holds for figure in outcome.figures)
    count = len(outcome.figures)
    if kept == count:
        return (
            "The finding holds: "
            + ("its figure lies" if count == 1 else f"all {count} figures lie")
            + " where the paper expects."
        )
    missed = ", ".join(figure.name for figure in outcome.figures if not figure.holds)
    return f"{kept} of {count} figures lie where the paper expects; not so: {missed}."


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
