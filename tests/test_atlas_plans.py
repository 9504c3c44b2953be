"""The atlas of a model under a plan: what heads do then, and what cannot be said of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from regard.atlases.record import Atlas
from regard.atlases.survey import atlas
from regard.core.errors import UnsupportedError
from regard.plan import Plan, Step
from regard.testing.tiny import prompt, tiny_decoder

pytest.importorskip("transformers")
IDS = prompt(40, batch=2)


def plan(treatment: str, options: dict[str, Any] | None = None, **where: Any) -> Plan:
    return Plan(steps=(Step(treatment=treatment, options=options or {}, **where),))


def measured(under: Plan | None = None, probes: Any = "readings") -> Atlas:
    return atlas(tiny_decoder(), [{"input_ids": IDS}], probes, plan=under)


@pytest.fixture(scope="module")
def untouched() -> Atlas:
    return measured()


def test_a_plan_that_changes_nothing(untouched: Atlas) -> None:
    same = measured(plan("temperature", {"tau": 1.0}, layers="all"))
    assert same.rows == untouched.rows


def test_rewritten_weights_are_what_is_read(untouched: Atlas) -> None:
    """A head made uniform has the entropy of uniform attention; its neighbours are as they were."""
    found = measured(plan("uniform_heads", layers=(0,), heads=(1,)))
    assert float(found.map("entropy")[0, 1]) == pytest.approx(math.lgamma(41) / 40, abs=1e-6)
    before, after = untouched.map("entropy")[0], found.map("entropy")[0]
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]])
    assert not torch.equal(untouched.map("entropy")[1], found.map("entropy")[1])


def test_bias_and_visibility_are_seen() -> None:
    """Without the weight of its first key a head has no sink there; through a window it is near."""
    away = measured(plan("initial_token", {"gamma": 1e-9}, layers=(0,), heads=(2,)))
    assert float(away.map("sink_first")[0, 2]) == pytest.approx(1 / 40, abs=1e-3)
    near = measured(plan("moa", {"alpha": 4, "beta": 0, "block": 1, "sinks": 0}, layers=(1,)))
    assert all(math.isnan(x) for x in near.map("distance")[1].tolist())
    assert any("another way" in reason for reason in near.notes.values())


def test_what_goes_on_top_of_a_plan() -> None:
    """An experiment changes heads of the model under its plan, not of the untouched one."""
    silent = plan("head_silence", layers=(1,), heads=(0,))
    found = measured(silent, ["ablation"])
    assert float(found.map("cost_of_zero")[1, 0]) == pytest.approx(0, abs=1e-6)
    assert float(measured(None, ["ablation"]).map("cost_of_zero")[1, 0]) != 0


def test_before_and_after(untouched: Atlas) -> None:
    rows = untouched.compare(measured(plan("uniform_heads", layers=(0,), heads=(1,))))
    most = max((r for r in rows if r["metric"] == "entropy"), key=lambda r: abs(r["difference"]))
    assert (most["layer"], most["head"]) == (0, 1)


def test_a_plan_in_force_is_not_displaced_in_silence() -> None:
    model = tiny_decoder()
    with (
        plan("uniform_heads", layers=(0,)).applied(model),
        pytest.raises(UnsupportedError, match="plan"),
    ):
        atlas(model, [{"input_ids": IDS}])
    atlas(model, [{"input_ids": IDS}])
