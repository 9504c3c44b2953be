"""Every card of the library keeps the contract; no method is named here."""

from __future__ import annotations

import pytest

from regard.core.catalog import cards
from regard.testing import CHECKS, checks_for, run_check

PAIRS = [
    pytest.param(
        name, check, id=f"{name}-{check}", marks=[pytest.mark.slow] if CHECKS[check].slow else []
    )
    for name, entry in cards().items()
    for check in checks_for(entry)
]


@pytest.mark.parametrize(("name", "check"), PAIRS)
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch")  # the compiler's own
def test_contract(name: str, check: str) -> None:
    run_check(cards()[name], check)


@pytest.mark.parametrize("name", cards())
def test_excuses_name_checks_that_apply(name: str) -> None:
    entry = cards()[name]
    assert set(entry.gaps) <= set(checks_for(entry)) <= set(CHECKS)
