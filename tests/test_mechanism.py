"""Every operator without parameters, as a treatment of a finished model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import ENCODERS
from torch import Tensor

from regard.core.card import Card
from regard.core.catalog import cards, treatment
from regard.core.errors import ArgumentError, RegardError, UnsupportedError
from regard.core.treatment import Trial
from regard.plan import Plan, PlanError, Step
from regard.testing.compare import close
from regard.testing.patient import Patient
from regard.testing.tiny import prompt, tiny_decoder, tiny_encoder
from regard.testing.treatment_decoding import check_beams, check_decoding
from regard.testing.treatments import check_padding
from regard.treatments.mechanism import Mechanism

pytest.importorskip("transformers")

PLAIN = {n: c for n, c in cards().items() if c.kind == "operator" and not isinstance(c.build, type)}
LENGTH = 30


def options(card: Card) -> dict[str, Any]:
    sized = card.example.sized((LENGTH,)) if card.example.sized else {}
    return {**card.example.options, **sized}


def patient(card: Card) -> Patient:
    example = Trial({"operator": card.name, "options": options(card)}, length=LENGTH)
    return Patient(replace(treatment("mechanism"), example=example))


DECODING = [n for n, c in PLAIN.items() if c.causal and 1 in c.grids and c.cost.state != "none"]
PROMPT = [n for n, c in PLAIN.items() if c.causal and 1 in c.grids and c.cost.state == "none"]


@pytest.mark.parametrize("name", DECODING)
def test_decodes_as_it_reads(name: str) -> None:
    subject = patient(PLAIN[name])
    check_decoding(subject)
    check_padding(subject)


@pytest.mark.parametrize("name", ["cca", "block_topk"])
def test_beams(name: str) -> None:
    check_beams(patient(PLAIN[name]))


@pytest.mark.parametrize("name", PROMPT)
def test_prompt_alone(name: str) -> None:
    """What cannot decode is refused for decoding, and serves the prompt."""
    subject = patient(PLAIN[name])
    with pytest.raises(PlanError, match=r"phases.*prefill"):
        subject.plan().resolve(subject.model)
    step = subject.plan().steps[0].model_copy(update={"phases": ("prefill",)})
    found = subject.logits(Plan(steps=(step,)), subject.ids)
    assert found.isfinite().all()
    assert not torch.allclose(found, subject.logits(None, subject.ids), atol=1e-6)


@pytest.mark.parametrize("name", ["cca", "non_approximate", "linear", "block_topk"])
def test_some_heads_only(name: str) -> None:
    """Heads that share their keys with others which are left alone."""
    card, model, ids = PLAIN[name], tiny_decoder(), prompt(LENGTH + 1)
    chosen = {"operator": card.name, "options": options(card)}
    steps = (Step(treatment="mechanism", options=chosen, heads=(0, 3)),)
    with Plan(steps=steps).applied(model), torch.no_grad():
        whole = model(ids, use_cache=False).logits[:, -1]
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        last = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    close(last, whole, name, 1e-9)


def test_a_window_with_sinks_is_stream() -> None:
    """In the prompt; later a stream, which evicts after each call, holds one key more."""
    model, ids, found = tiny_decoder(), prompt(LENGTH), []
    chosen = {"operator": "sliding_window", "options": {"window": 6, "sinks": 2}}
    for step in (
        Step(treatment="mechanism", options=chosen),
        Step(treatment="stream", options={"recent": 6, "sinks": 2, "window": True}),
    ):
        with Plan(steps=(step,)).applied(model), torch.no_grad():
            found.append(model(ids, use_cache=False).logits)
    close(found[0], found[1], "window", 1e-9)


def test_an_encoder() -> None:
    model, ids = tiny_encoder(), prompt(LENGTH)
    found = []
    for operator in ("softmax", "sliding_window"):
        chosen = {"window": 3} if operator == "sliding_window" else {}
        step = Step(treatment="mechanism", options={"operator": operator, "options": chosen})
        with Plan(steps=(step,)).applied(model), torch.no_grad():
            found.append(model(ids).logits)
    with torch.no_grad():
        close(found[0], model(ids).logits, "softmax", 1e-9)
    assert not torch.allclose(found[1], found[0], atol=1e-6)


@pytest.mark.parametrize(
    ("operator", "chosen", "kind"),
    [
        ("sliding_widow", {}, LookupError),
        ("hilo", {}, UnsupportedError),
        ("dma", {}, UnsupportedError),
        ("sliding_window", {"widow": 3}, ArgumentError),
        ("sliding_window", {"window": "three"}, ArgumentError),
        ("sliding_window", {"window": 0}, ArgumentError),
        ("s2_attention", {"pattern_heads": 3}, ArgumentError),
    ],
)
def test_refused_before_anything_runs(operator: str, chosen: Any, kind: type[Exception]) -> None:
    step = Step(treatment="mechanism", options={"operator": operator, "options": chosen})
    with pytest.raises(kind):
        Plan(steps=(step,)).resolve(tiny_decoder())


def test_patterns_are_refused() -> None:
    """Causal operators on an encoder, operators on grids on a decoder."""
    for model, causal in ((tiny_encoder(), False), (tiny_decoder(), True)):
        for card in PLAIN.values():
            wanted = "causal self" if causal else "noncausal self"
            if wanted in card.patterns and 1 in card.grids:
                continue
            step = Step(
                treatment="mechanism",
                options={"operator": card.name, "options": options(card)},
                phases=("prefill",),
            )
            with pytest.raises(RegardError):
                Plan(steps=(step,)).resolve(model)


def test_a_state_needs_its_prompt() -> None:
    model, ids = tiny_decoder(), prompt(LENGTH)
    step = Step(treatment="mechanism", options={"operator": "cca"}, phases=("decode",))
    with Plan(steps=(step,)).applied(model), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(UnsupportedError, match="prompt"):
            model(ids[:, :1], past_key_values=cache, use_cache=True)


def test_lists_are_tuples() -> None:
    made = Mechanism("s2_attention", {"local": [2, 0], "block": 2})
    assert made.run.keywords["local"] == (2, 0)


@pytest.mark.parametrize(
    ("operator", "everything", "less"),
    [
        ("paro", {"density": 1.0, "block": 4}, {"density": 0.3, "block": 4}),
        ("gna", {"kernel": 9, "stride": 1}, {"kernel": [3, 3], "stride": 1}),
    ],
)
def test_a_grid(operator: str, everything: dict[str, Any], less: dict[str, Any]) -> None:
    """Operators on images, in a vision transformer with a class token before its 4 x 4 patches."""
    model, inputs = ENCODERS["ViT"]()

    def output(chosen: dict[str, Any] | None) -> Tensor:
        given = {"operator": operator, "options": chosen, "grid": (4, 4), "prefix": 1}
        steps = () if chosen is None else (Step(treatment="mechanism", options=given),)
        with Plan(steps=steps).applied(model), torch.no_grad():
            return model(**inputs).last_hidden_state

    plain = output(None)
    assert torch.allclose(output(everything), plain, rtol=0, atol=1e-5)
    assert not torch.allclose(output(less), plain, rtol=0, atol=1e-4)


def test_a_grid_that_is_not_said() -> None:
    given = {"operator": "paro", "options": {"density": 1.0}}
    with pytest.raises(UnsupportedError, match="option grid"):
        Plan(steps=(Step(treatment="mechanism", options=given),)).resolve(ENCODERS["ViT"]()[0])
