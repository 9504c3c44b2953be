"""Windows that grow with the prompt and then stand still; what losing a key does to the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from regard.core.catalog import treatments
from regard.core.errors import ArgumentError, UnsupportedError
from regard.importance.influence import block_influence, influence
from regard.masks.elastic import Elastic
from regard.treatments.moa import MoA, layout

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("alpha", "beta", "length", "band"),
    [
        (0, 0.25, 512, 2),
        (-128, 0.5, 512, 2),
        (-100, 0.5, 512, 2),  # floors: -100 // 64 = -2
        (1000, 0, 64, 15),
        (0, 0.3, 512, 2),  # 2.4
        (-640, 0.5, 512, 1),  # never none
        (0, 1, 65, 2),  # a begun block counts
    ],
)
def test_band(alpha: float, beta: float, length: int, band: int) -> None:
    assert Elastic(alpha, beta).band(torch.tensor([length])).tolist() == [band]


def test_layout_is_a_band_and_the_first_blocks() -> None:
    found = layout(Elastic(0, 0.25, block=4, sinks=1), 32)
    row = torch.arange(8)
    gap = row[:, None] - row
    assert torch.equal(found, (gap >= 0) & ((gap < 2) | (row == 0)))


@pytest.mark.parametrize("bad", [{"block": 0}, {"sinks": -1}, {"beta": float("nan")}])
def test_bad_rules(bad: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        MoA(**{"alpha": 0.0, "beta": 0.5, **bad})


def test_an_encoder_is_refused() -> None:
    from regard.plan import Plan, Step
    from regard.testing.tiny import tiny_encoder

    plan = Plan(steps=(Step(treatment="moa", options={"alpha": 0, "beta": 0.5}),))
    with pytest.raises(UnsupportedError, match="causal"):
        plan.resolve(tiny_encoder())


def test_each_head_has_its_window_and_keeps_it() -> None:
    from regard.plan import Plan, Step
    from regard.testing.tiny import prompt, tiny_decoder

    model = tiny_decoder()
    rules = ({"alpha": 4, "beta": 0.0}, {"alpha": -4, "beta": 0.5})  # 4 and -4 + 12 tokens
    plan = Plan(
        steps=tuple(
            Step(treatment="moa", options={**rule, "block": 2}, kv_heads=(head,))
            for head, rule in enumerate(rules)
        )
    )
    with plan.applied(model) as run, torch.no_grad():
        ids = prompt(44)
        cache = model(ids[:, :24], use_cache=True).past_key_values
        for t in range(24, 44):
            model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        held = [b for layer in run.report()["layers"] for b in layer["buckets"]]
    assert {(b["heads"][0], b["keys"]) for b in held} == {(0, 2 + 4 - 1), (1, 2 + 8 - 1)}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("stream", {"sinks": 2, "recent": 6, "window": True}),
        ("stream", {"sinks": 0, "recent": 1, "window": True}),
        ("moa", {"alpha": 5, "beta": 0, "block": 1, "sinks": 2}),
        ("moa", {"alpha": 0, "beta": 0.5, "block": 1, "sinks": 0}),
    ],
)
def test_a_step_of_several_tokens_sees_what_single_steps_see(
    name: str, options: Mapping[str, Any]
) -> None:
    from regard.testing.patient import Patient

    patient = Patient(treatments()[name])
    plan = patient.plan(options)
    single = patient.decoded(plan, patient.ids)
    several = patient.decoded(plan, patient.ids, chunks=(3, 1, 2))
    torch.testing.assert_close(several, single, rtol=0, atol=1e-9)


def test_a_window_decodes_as_it_reads() -> None:
    """Sinks and window over the prompt, too: decoding is one forward over everything."""
    from regard.testing.patient import STEPS, Patient
    from regard.testing.tiny import prompt

    patient = Patient(treatments()["stream"])
    plan = patient.plan({"sinks": 2, "recent": 6, "window": True})
    whole = torch.cat([patient.ids, prompt(STEPS, batch=2, seed=2)], 1)
    expected = patient.logits(plan, whole)[:, patient.ids.shape[1] - 1 :]
    torch.testing.assert_close(patient.decoded(plan, patient.ids), expected, rtol=0, atol=1e-9)


def test_influence_is_the_change_of_a_linear_loss() -> None:
    weights = torch.randn(2, 3, 5, 7, dtype=torch.float64).softmax(-1)
    gradients = torch.randn_like(weights)
    found = influence(weights, gradients)
    for j in range(7):
        without = weights.clone()
        without[..., j] = 0
        without = without / without.sum(-1, keepdim=True)
        change = ((without - weights) * gradients).sum(-1)
        torch.testing.assert_close(found[..., j], change, rtol=0, atol=1e-12)


def test_influence_of_an_only_key() -> None:
    weights = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    found = influence(weights, torch.tensor([[3.0, 5.0, 7.0]], dtype=torch.float64))
    assert found.tolist() == [[-3.0, 0.0, 0.0]]


def test_influence_by_blocks() -> None:
    effect = torch.randn(2, 5, 7)
    found = block_influence(effect, 3)
    assert found.shape == (2, 2, 3)
    torch.testing.assert_close(found[:, 1, 1], effect[:, 3:, 3:6].abs().sum((1, 2)))
    torch.testing.assert_close(found.sum(), effect.abs().sum())
