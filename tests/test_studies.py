"""Studies: every one runs, twice alike; and, slowly, finds what its paper found."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest

from regard.core.catalog import study_cards
from regard.core.study import Figure, Outcome


def quiet(share: float) -> None:
    assert 0 <= share <= 1


@pytest.mark.parametrize("name", study_cards())
def test_small_runs_are_finite_and_alike(name: str) -> None:
    card = study_cards()[name]
    study = card.build(**card.small)
    told: list[float] = []
    first, again = study.run(told.append), card.build(**card.small).run(quiet)
    assert first == again
    assert told == sorted(told)
    assert told[-1] == 1
    names = [figure.name for figure in first.figures]
    assert names
    assert len(set(names)) == len(names)
    for figure in first.figures:
        assert math.isfinite(figure.value), figure.name
        assert figure.expected
        assert figure.low is not None or figure.high is not None
    assert first.curves or first.maps, "a study shows a picture"


@pytest.mark.parametrize("name", study_cards())
def test_the_seed_matters(name: str) -> None:
    card = study_cards()[name]
    assert "seed" in {f.name for f in fields(card.build)}  # type: ignore[arg-type]
    study = card.build(**card.small)
    other = replace(study, seed=study.seed + 1)  # type: ignore[type-var, attr-defined]
    assert study.run(quiet).figures != other.run(quiet).figures


@pytest.mark.slow
@pytest.mark.parametrize("name", study_cards())
def test_finds_what_the_paper_found(name: str) -> None:
    outcome = study_cards()[name].build().run(quiet)
    missed = [(f.name, f.value, f.low, f.high) for f in outcome.figures if not f.holds]
    assert not missed


def test_bounds() -> None:
    assert Figure("x", 1.0, "about one", 0.5, 1.5).holds
    assert not Figure("x", 2.0, "about one", 0.5, 1.5).holds
    assert not Figure("x", math.nan, "about one", 0.5).holds
    assert Outcome((Figure("x", 1.0, "at least a half", low=0.5),)).holds
