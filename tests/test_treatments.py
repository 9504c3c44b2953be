"""Every treatment under every check of its contract."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from regard.core.catalog import treatments
from regard.testing.patient import Patient
from regard.testing.treatments import TREATMENT_CHECKS

pytest.importorskip("transformers")


def pairs() -> Iterator[Any]:
    for name, card in treatments().items():
        for check in TREATMENT_CHECKS:
            reason = card.gaps.get(check)
            marks = [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True)]
            yield pytest.param(name, check, marks=marks, id=f"{name}-{check}")


@pytest.mark.parametrize(("name", "check"), list(pairs()))
def test_treatment(name: str, check: str) -> None:
    TREATMENT_CHECKS[check](Patient(treatments()[name]))


@pytest.mark.parametrize("name", list(treatments()))
def test_card(name: str) -> None:
    card = treatments()[name]
    assert card.evidence in ("golden", "exact"), "the text of a paper alone is no evidence"
    assert set(card.gaps) <= set(TREATMENT_CHECKS), "a gap of no check"
    assert card.places, "it overrides no place"
