"""The tables of the documentation: every card as one row, generated, never typed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from regard.core.card import Card, Paper
from regard.core.catalog import (
    cards,
    probe_cards,
    recipe_cards,
    searcher_cards,
    study_cards,
    treatments,
)
from regard.core.probe import ProbeCard
from regard.core.recipe import RecipeCard
from regard.core.searcher import SearcherCard
from regard.core.study import StudyCard
from regard.core.treatment import TreatmentCard

Told = TreatmentCard | ProbeCard | StudyCard | SearcherCard | RecipeCard
STATUS_START, STATUS_END = "<!-- status: made by `make docs` -->", "<!-- end of status -->"

_HEAD = """# Methods

Generated from the cards by `make docs`; do not edit. *golden*: agrees with the authors' code.
*exact*: coincides with another mechanism in a limit, or its forms agree. Patterns: N noncausal,
C causal; self/cross. Cost is the counted exponent of N; state is what decoding keeps.

"""


_TREATMENTS = """# Treatments

What a step of a plan can do to chosen heads of a model. Generated from the cards by `make docs`; do
not edit. *golden*: agrees with the authors' code. *exact*: some options coincide with the untouched
model or with another treatment. Places: what of the attention call it changes.
`regard plan treatments NAME` tells the options.

"""


_PROBES = """# Probes

What an atlas measures. Generated from the cards by `make docs`; do not edit. A *reading* watches
one forward per passage, streamed in tiles; an *experiment* changes heads and runs the model again.
*golden*: agrees with the authors' code. *exact*: known answers, which the tests hold.
`regard atlas MODEL --probes NAME,NAME` measures some of them.

"""

_STUDIES = """# Studies

Findings of papers, made again at pocket size. Generated from the cards by `make docs`; do not edit.
`regard study NAME` runs one and prints each figure beside the paper's expectation.

"""

_SEARCHERS = """# Searchers

Ways from a measurement to a plan, to a smaller model, or to the samples that matter. Generated from
the cards by `make docs`; do not edit.

"""

_RECIPES = """
## Recipes

Training and distillation that plans and smaller models need.
"""


def methods_page() -> str:
    """Markdown page with one table per family."""
    parts = [_HEAD + f"{len(cards())} methods.\n"]
    for family in ("scored", "selected", "pooled", "recurrent", "free"):
        rows = [c for c in cards().values() if c.family == family]
        if rows:
            parts.append(_table(family, rows))
    return "\n".join(parts)


def treatments_page() -> str:
    """Markdown page with one table of all treatments."""
    found = treatments().values()
    lines = ["| name | what it does | places | evidence | paper |", "|---|---|---|---|---|"]
    lines += [_treatment_row(card) for card in found]
    return _TREATMENTS + f"{len(found)} treatments.\n\n" + "\n".join(lines) + "\n"


def probes_page() -> str:
    """Markdown page with one table of all probes."""
    lines = [
        "| name | what it measures | kind | metrics | evidence | paper |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_probe_row(card) for card in probe_cards().values()]
    return _PROBES + f"{len(probe_cards())} probes.\n\n" + "\n".join(lines) + "\n"


def studies_page() -> str:
    """Markdown page with one table of all studies."""
    lines = ["| name | what is found | seconds | paper |", "|---|---|---|---|"]
    lines += [_study_row(card) for card in study_cards().values()]
    return _STUDIES + "\n".join(lines) + "\n"


def searchers_page() -> str:
    """Markdown page with one table of all searchers, and one of the recipes they need."""
    lines = ["| name | how it searches | finds | paper |", "|---|---|---|---|"]
    lines += [_cells(card, card.finds) for card in searcher_cards().values()]
    lines += [_RECIPES, "| name | what is trained | paper |", "|---|---|---|"]
    lines += [_cells(card) for card in recipe_cards().values()]
    return _SEARCHERS + "\n".join(lines) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "methods.md": methods_page,
    "treatments.md": treatments_page,
    "probes.md": probes_page,
    "studies.md": studies_page,
    "searchers.md": searchers_page,
}
"""File in docs -> what makes it."""


def status_table() -> str:
    """Markdown table for the README: methods and evidence per family."""
    lines = ["| family | methods | golden | exact |", "|---|---|---|---|"]
    for family in ("scored", "selected", "pooled", "recurrent", "free"):
        rows = [c for c in cards().values() if c.family == family]
        golden = sum(c.evidence == "golden" for c in rows)
        lines.append(f"| {family} | {len(rows)} | {golden} | {len(rows) - golden} |")
    for name, table in (("treatments", treatments()), ("probes", probe_cards())):
        golden = sum(c.evidence == "golden" for c in table.values())
        lines.append(f"| {name} | {len(table)} | {golden} | {len(table) - golden} |")
    return "\n".join(lines) + "\n"


def with_status(readme: str) -> str:
    """The README with the table between its two status markers made anew."""
    head, rest = readme.split(STATUS_START)
    return head + STATUS_START + "\n" + status_table() + STATUS_END + rest.split(STATUS_END)[1]


def write_pages(root: Path) -> None:
    """Rewrite the tables in docs, and the README's status table, below `root`."""
    for name, made in PAGES.items():
        (root / "docs" / name).write_text(made())
    readme = root / "README.md"
    readme.write_text(with_status(readme.read_text()))


def _table(family: str, rows: list[Card]) -> str:
    lines = [
        f"## {family}\n",
        "| name | what differs | patterns | grids | time | state | evidence | paper |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    return "\n".join(lines + [_row(c) for c in rows]) + "\n"


def _row(card: Card) -> str:
    patterns = ", ".join(p.replace("noncausal", "N").replace("causal", "C") for p in card.patterns)
    grids = ", ".join(f"{g}-D" for g in card.grids)
    papers, summary = _papers(card.papers), card.summary.replace("|", "\\|")
    cells = (f"`{card.name}`", summary, patterns, grids, f"N^{card.cost.time:g}", card.cost.state)
    return "| " + " | ".join((*cells, card.evidence, papers)) + " |"


def _treatment_row(card: TreatmentCard) -> str:
    return _cells(card, ", ".join(card.places), card.evidence)


def _probe_row(card: ProbeCard) -> str:
    names = ", ".join(f"`{name}`" for name in (*card.metrics, *card.layers))
    return _cells(card, card.kind, names, card.evidence)


def _study_row(card: StudyCard) -> str:
    return _cells(card, str(card.seconds))


def _cells(card: Told, *more: str) -> str:
    """Name and summary, what else a table tells, papers."""
    summary = card.summary.replace("|", "\\|")
    return "| " + " | ".join((f"`{card.name}`", summary, *more, _papers(card.papers))) + " |"


def _papers(papers: Iterable[Paper]) -> str:
    return ", ".join(f"[{p.title}]({p.url}) ({p.year})" for p in papers)
