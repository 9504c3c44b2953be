"""The methods page: every card as one row, generated, never typed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from regard.core.card import Card, Paper
from regard.core.catalog import cards, treatments
from regard.core.treatment import TreatmentCard

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


def status_table() -> str:
    """Markdown table for the README: methods and evidence per family."""
    lines = ["| family | methods | golden | exact |", "|---|---|---|---|"]
    for family in ("scored", "selected", "pooled", "recurrent", "free"):
        rows = [c for c in cards().values() if c.family == family]
        golden = sum(c.evidence == "golden" for c in rows)
        lines.append(f"| {family} | {len(rows)} | {golden} | {len(rows) - golden} |")
    found = treatments().values()
    golden = sum(c.evidence == "golden" for c in found)
    lines.append(f"| treatments | {len(found)} | {golden} | {len(found) - golden} |")
    return "\n".join(lines) + "\n"


def with_status(readme: str) -> str:
    """The README with the table between its two status markers made anew."""
    head, rest = readme.split(STATUS_START)
    return head + STATUS_START + "\n" + status_table() + STATUS_END + rest.split(STATUS_END)[1]


def write_pages(root: Path) -> None:
    """Rewrite the tables of methods and treatments in docs, and the README's status table, below
    `root`.
    """
    (root / "docs" / "methods.md").write_text(methods_page())
    (root / "docs" / "treatments.md").write_text(treatments_page())
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
    summary = card.summary.replace("|", "\\|")
    cells = (f"`{card.name}`", summary, ", ".join(card.places), card.evidence)
    return "| " + " | ".join((*cells, _papers(card.papers))) + " |"


def _papers(papers: Iterable[Paper]) -> str:
    return ", ".join(f"[{p.title}]({p.url}) ({p.year})" for p in papers)
