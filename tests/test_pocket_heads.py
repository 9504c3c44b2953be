"""What experiments say of a model that can do something: they agree on the heads that retrieve."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import regard
from regard.atlases.record import Atlas
from regard.atlases.survey import atlas
from regard.core.passage import Passage
from regard.core.scene import Scene
from regard.probes.ablation import Ablation
from regard.probes.activation_patching import ActivationPatching
from regard.probes.circuits import circuit_overlap, in_circuit
from regard.probes.influence import attention_influence
from regard.recipes.measures import generated
from regard.recipes.retrieval_heads import silencing_plan
from regard.tasks.corpus import corpus
from regard.tasks.induction import Induction
from regard.tasks.needle import Needle

pytest.importorskip("transformers")
TOP = 4


@pytest.fixture(scope="module")
def model() -> Any:
    return regard.pocket.language()[0]


@pytest.fixture(scope="module")
def questions() -> list[Passage]:
    """Needles, each with another value in its contrast, which is then the wrong answer."""
    drawn = Needle(length=256, examples=8).questions("valid", 8)
    return [question.passage() for question in itertools.islice(drawn, 1)]


@pytest.fixture(scope="module")
def measured(model: Any, questions: list[Passage]) -> Atlas:
    probes = ["retrieval", "logit_lens", "path_patching", "arithmetic"]
    return atlas(model, questions, probes, examples=0)


def test_four_ways_to_the_same_heads(measured: Atlas) -> None:
    """What is looked at, what is said, what is sent and what holds the answer up."""
    heads = set(measured.select("retrieval", top=TOP))
    assert min(float(measured.map("retrieval")[head]) for head in heads) > 0.5
    for metric in ("head_gap", "head_lens", "path_effect"):
        assert set(measured.select(metric, top=TOP)) == heads, metric
    assert set(measured.select("direct_effect", top=TOP, lowest=True)) == heads
    share = TOP / measured.map("retrieval").numel()
    circuits = [in_circuit(measured.map(m), share) for m in ("path_effect", "retrieval")]
    assert circuit_overlap(*circuits) == 1


def test_what_they_read_is_prepared_below(
    model: Any, questions: list[Passage], measured: Atlas
) -> None:
    """A head of the first layer matters through others: not on its direct path."""
    found = atlas(model, questions, [ActivationPatching()], examples=0).map("patch_effect")
    below = int(found[0].argmax())
    assert float(found[0, below]) > 0.1
    assert abs(float(measured.map("path_effect")[0, below])) < 0.01


def texts() -> list[Passage]:
    """Segments that come again, and plain text."""
    batch = next(iter(Induction(length=128, examples=4).batches("test", 4)))
    plain = torch.tensor(list(bytes(corpus("test", None))[: 4 * 128])).view(4, 128)
    return [
        Passage({"input_ids": ids}, ids, domain=domain)
        for ids, domain in ((batch.inputs, "repeated"), (plain, "text"))
    ]


def test_some_heads_are_active_on_repetition_and_others_on_text(
    model: Any, measured: Atlas
) -> None:
    """What is dormant in one domain is active in the other."""
    scene = Scene.of(model, texts())
    repeated, text = attention_influence(scene, measured.select("retrieval", top=TOP))
    assert float(repeated.min()) > float(text.max()), "repeated texts rank first"
    assert float(repeated.mean()) > 5 * float(text.mean())
    repeated, text = attention_influence(scene, [(2, head) for head in range(4)])
    assert float(text.mean()) > 5 * float(repeated.mean().abs())


def test_costs_by_domain(model: Any) -> None:
    found = atlas(model, texts(), [Ablation(("uniform",))], examples=0)
    repeated, text = (found.map(f"cost_of_uniform@{d}") for d in ("repeated", "text"))
    assert float(text[2].min()) > 0.005
    assert float(repeated[2].mean()) < float(text[2].mean()) / 5


def test_without_the_heads_that_the_atlas_calls_retrieval_no_needle_is_found(
    model: Any, measured: Atlas
) -> None:
    """The causal check: as many heads spread over the others, made uniform likewise, do no harm."""
    order = measured.select("retrieval", top=1.0)
    heads, rest = order[:TOP], order[TOP:]
    others = rest[:: len(rest) // TOP][:TOP]
    task = Needle(length=256, examples=32)
    answers = []
    for chosen in ((), others, heads):
        with silencing_plan(chosen).applied(model):
            answers.append(generated(model, task, "test"))
    untouched, without_others, without = answers
    assert untouched > 0.9
    assert without_others > 0.9 * untouched
    assert without <= task.chance
