"""The finding of a comparison in plain sentences, every word of it computed from the rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from markupsafe import Markup

from regard.report.record import Comparison, Row
from regard.report.units import amount, byte_size, percent, short_percent

NEAR_CHANCE = 0.05  # at most this much above chance counts as not learned
ABOUT_EQUAL = 1.2  # ratio below which two states are not told apart
NAMED = 5  # longer lists of names are cut


def finding(comparison: Comparison) -> Markup:
    """One paragraph: who solves the task, at what state, who does not learn, what state buys."""
    sentences = [
        _who_solves(comparison),
        _smallest_state(comparison.rows),
        *_growth(comparison.rows),
        _near_chance(comparison),
        _diverged(comparison.rows),
    ]
    return Markup(" ").join(sentence for sentence in sentences if sentence)


def _who_solves(comparison: Comparison) -> Markup:
    rows, task = comparison.rows, comparison.task_name
    solved = [row for row in rows if row.solved]
    guess = short_percent(comparison.chance)
    best = rows[0]
    if best.accuracy_mean is None:
        return Markup("No accuracy was measured on {}: every run diverged.").format(task)
    score = percent(best.accuracy_mean)
    if len(rows) == 1:
        return Markup("{} reaches {} on {}, where guessing scores {}.").format(
            _name(best), score, task, guess
        )
    if not solved:
        return Markup(
            "None of the {} reaches 99\u202f% on held-out data of {}; {} comes closest with {}. "
            "Guessing scores {}."
        ).format(_counted(rows), task, _name(best), score, guess)
    if len(solved) == len(rows):
        return Markup(
            "All {} reach 99\u202f% on held-out data of {}, where guessing scores {}."
        ).format(_counted(rows), task, guess)
    return Markup(
        "{} of {} {} 99\u202f% on held-out data of {}, where guessing scores {}: {}."
    ).format(
        len(solved), _counted(rows), _verb(solved, "reaches", "reach"), task, guess, _names(solved)
    )


def _counted(rows: Sequence[Row]) -> str:
    """How many rows there are, and of how many mechanisms if some come in several variants."""
    mechanisms = len({row.mechanism for row in rows})
    if mechanisms == len(rows):
        return f"{len(rows)} mechanisms"
    return f"{len(rows)} variants of {mechanisms} mechanism{'s' if mechanisms > 1 else ''}"


def _smallest_state(rows: Sequence[Row]) -> Markup | None:
    """Which solver decodes with the least memory, set against the largest."""
    sized = [(row.state_bytes, row) for row in rows if row.solved and row.state_bytes]
    if len(sized) < 2:
        return None
    (least, small), (most, large) = (pick(sized, key=lambda s: s[0]) for pick in (min, max))
    if most < ABOUT_EQUAL * least:
        return Markup("Their decode states are about equal, near {}.").format(byte_size(least))
    return Markup("Of these, {} decodes with the smallest state: {}, against {} for {}.").format(
        _name(small), byte_size(least), byte_size(most), _name(large)
    )


def _growth(rows: Sequence[Row]) -> list[Markup]:
    """Mechanisms that fail with a small state and solve the task, or nearly, with a larger one."""
    variants: dict[str, list[tuple[int, float, Row]]] = defaultdict(list)
    for row in rows:
        if row.state_bytes and row.accuracy_mean is not None:
            variants[row.mechanism].append((row.state_bytes, row.accuracy_mean, row))
    sentences = []
    for mechanism, found in variants.items():
        (small, low, first), (large, high, last) = (
            pick(found, key=lambda f: f[:2]) for pick in (min, max)
        )
        if large > small and not first.solved and (last.solved or high - low > 0.1):
            text = "With a state {}× larger, {} rises from {} to {}."
            rise = amount(large / small), _code(mechanism), percent(low), percent(high)
            sentences.append(Markup(text).format(*rise))
    return sentences


def _near_chance(comparison: Comparison) -> Markup | None:
    limit = comparison.chance + NEAR_CHANCE
    rows = [r for r in comparison.rows if r.accuracy_mean is not None and r.accuracy_mean <= limit]
    if not rows:
        return None
    return Markup("{} {} no more than five points above chance.").format(
        _names(rows), _verb(rows, "stays", "stay")
    )


def _diverged(rows: Sequence[Row]) -> Markup | None:
    diverged = [row for row in rows if row.broken or row.accuracy_mean is None]
    if not diverged or rows[0].accuracy_mean is None:
        return None
    return Markup("Training of {} diverged in at least one run.").format(_names(diverged))


def _verb(rows: Sequence[Row], singular: str, plural: str) -> str:
    return singular if len(rows) == 1 else plural


def _code(text: str) -> Markup:
    return Markup("<code>{}</code>").format(text)


def _name(row: Row) -> Markup:
    return _code(row.label)


def _names(rows: Sequence[Row]) -> Markup:
    """Names of rows as a list in words, cut after a few."""
    names = [_name(row) for row in rows[:NAMED]]
    if len(rows) > NAMED:
        names.append(Markup("{} more").format(len(rows) - NAMED))
    if len(names) < 2:
        return names[0]
    return Markup("{} and {}").format(Markup(", ").join(names[:-1]), names[-1])
