"""Agreement with the authors' code: every case of every file that a card names, generically.

The folder is named by REGARD_GOLDENS (default: ../shared/goldens beside the checkout).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from regard.core.card import Golden
from regard.core.catalog import (
    cards,
    lens_cards,
    probe_cards,
    recipe_cards,
    searcher_cards,
    study_cards,
    treatments,
)
from regard.testing.compare import close

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(os.environ.get("REGARD_GOLDENS", ROOT / ".." / "shared" / "goldens"))
NAMED = [
    (name, golden)
    for table in (
        cards(),
        treatments(),
        probe_cards(),
        study_cards(),
        lens_cards(),
        searcher_cards(),
        recipe_cards(),
    )
    for name, entry in table.items()
    for golden in entry.goldens
]


def cases() -> Iterator[Any]:
    for name, golden in NAMED:
        path = FOLDER / golden.file
        if not path.exists():
            yield pytest.param(name, golden, None, id=f"{name}-{golden.file}-missing")
            continue
        for index, case in enumerate(torch.load(path, weights_only=True)["cases"]):
            if golden.only is None or golden.only(case):
                yield pytest.param(name, golden, case, id=f"{name}-{golden.file}-{index}")


@pytest.mark.parametrize(("name", "golden", "case"), list(cases()))
def test_golden(name: str, golden: Golden, case: dict[str, Any] | None) -> None:
    if case is None:
        if FOLDER.is_dir():
            pytest.fail(f"{golden.file} is not in {FOLDER}")
        pytest.skip(f"no goldens: {FOLDER} does not exist (set REGARD_GOLDENS)")
    outputs = {k: v for k, v in case["outputs"].items() if k not in golden.leaves}
    got = golden.replay(case)
    assert set(got) == set(outputs), "outputs neither reproduced nor left out with a reason"
    assert got, "a replay must reproduce something"
    for key, expected in outputs.items():
        same_as(got[key], expected, f"{name}: {key}")


def same_as(got: Any, expected: Any, what: str) -> None:
    """Compare nested values: integers and booleans exactly, floats by their precision."""
    if isinstance(expected, dict):
        assert set(got) == set(expected), what
        for key in expected:
            same_as(got[key], expected[key], f"{what}[{key}]")
        return
    if isinstance(expected, list) and any(isinstance(x, (torch.Tensor, dict)) for x in expected):
        assert len(got) == len(expected), what
        for index, wanted in enumerate(expected):
            same_as(got[index], wanted, f"{what}[{index}]")
        return
    wanted = torch.as_tensor(expected)
    found = torch.as_tensor(got)
    if not wanted.is_floating_point():
        assert torch.equal(found.to(wanted.dtype), wanted), what
        return
    close(found, wanted, what, 1e-10 if wanted.dtype == torch.float64 else 1e-5)
