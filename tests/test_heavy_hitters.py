"""Attention received by each key, and the keys kept for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.core.evicting import prompt_held
from regard.core.incoming import Incoming, bare
from regard.importance.observed import mass_and_viewers
from regard.treatments.h2o import CARD, H2O

pytest.importorskip("transformers")


def call(*, tokens: int = 11, seed: int = 0) -> Incoming:
    """A prompt of two sequences, one of them shorter by three; two query heads per key head."""
    source = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, h, tokens, 8, dtype=torch.float64, generator=source) for h in (4, 2, 2)
    )
    padding = torch.ones(2, tokens, dtype=torch.bool)
    padding[1, :3] = False
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return replace(bare(q, k, v), padding=padding, visible=causal & padding[:, None, None])


def columns(incoming: Incoming) -> tuple[Tensor, Tensor]:
    """Column sums of the weights and of what is seen, written out."""
    real = incoming.padding
    assert incoming.visible is not None
    assert real is not None
    k = incoming.k.repeat_interleave(2, 1)
    scores = incoming.q @ k.transpose(-1, -2) * incoming.scale
    seen = incoming.visible & real[:, None, :, None]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    mass = weights.sum(2).unflatten(1, (2, 2)).mean(2)
    return mass, seen.sum(2).expand(-1, 2, -1).double()


@pytest.mark.parametrize("workspace", [1, 4000, 2**28])
def test_sums_do_not_depend_on_the_workspace(workspace: int) -> None:
    incoming = call()
    mass, viewers = mass_and_viewers(prompt_held(incoming), workspace)
    expected = columns(incoming)
    torch.testing.assert_close(mass, expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(viewers, expected[1])


def test_sums_of_half_precision_are_single() -> None:
    incoming = bare(*(torch.randn(1, 2, 5, 8, dtype=torch.bfloat16) for _ in range(3)))
    mass, _ = mass_and_viewers(prompt_held(incoming))
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass.sum(-1), torch.full((1, 2), 5.0), rtol=0.02, atol=0)


@pytest.mark.parametrize("normalise", [False, True])
def test_the_heaviest_stay(normalise: bool) -> None:
    incoming = call()
    held = prompt_held(incoming)
    keep = H2O(heavy=3, recent=2, normalise=normalise).keep(held)
    mass, viewers = columns(incoming)
    score = mass / viewers.clamp_min(1) if normalise else mass
    score = score.masked_fill(~held.real, -1)
    score[..., -2:] = -1
    expected = torch.zeros_like(keep).scatter_(2, score.topk(3).indices, True)
    expected[..., -2:] = True
    assert torch.equal(keep, expected)


def test_normalising_changes_the_choice() -> None:
    plain, fair = (
        H2O(heavy=3, recent=2, normalise=choice).keep(prompt_held(call()))
        for choice in (False, True)
    )
    assert not torch.equal(plain, fair)


@pytest.mark.parametrize(
    ("options", "most"),
    [({"heavy": 5, "recent": 4}, 9), ({"budget": 0.5}, 18), ({"budget": 0.95}, 34)],
)
def test_the_cache_stays_within_its_budget(options: dict[str, Any], most: int) -> None:
    from regard.plan import Plan, Step
    from regard.testing.tiny import prompt, tiny_decoder

    model, plan = tiny_decoder(), Plan(steps=(Step(treatment="h2o", options=options),))
    ids = prompt(36)
    with plan.applied(model) as run, torch.no_grad():
        cache = model(ids[:, :24], use_cache=True).past_key_values
        for t in range(24, 36):
            model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        kept = [b["keys"] for layer in run.report()["layers"] for b in layer["buckets"]]
    assert kept
    assert set(kept) == {most}


def test_mass_follows_its_keys_while_the_cache_grows() -> None:
    from regard.testing.patient import Patient

    patient = Patient(CARD)
    plan = patient.plan({"heavy": 25, "recent": 8})  # full from the third step on
    dropped = patient.decoded(plan, patient.ids, chunks=(1,) * 12)
    hidden = patient.decoded(plan, patient.ids, chunks=(1,) * 12, masked_only=True)
    torch.testing.assert_close(dropped, hidden, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heavy": 3},
        {"recent": 3},
        {"heavy": 3, "recent": 3, "budget": 0.5},
        {"budget": 0.0},
        {"budget": 1.5},
        {"heavy": -1, "recent": 3},
        {"heavy": 3, "recent": 0},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        H2O(**options)
