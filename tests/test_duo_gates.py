"""Gates of retrieval heads: their loss, their training, and the plan they give."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from regard.core.errors import ArgumentError, UnsupportedError
from regard.recipes.duo_gates import Blend, GateTraining, Moves
from regard.recipes.duo_plan import plan_from_gates, streaming_heads
from regard.tasks.task import IGNORED, Batch
from regard.testing.tiny import prompt, tiny_decoder, tiny_encoder

pytest.importorskip("transformers")
BLENDS = get_args(Blend)


def batch(length: int = 14) -> Batch:
    """Random tokens, the last four of which are supervised."""
    ids = prompt(length, batch=2)
    targets = torch.full_like(ids, IGNORED)
    targets[:, -4:] = 1
    return Batch(ids, targets)


def training(blend: Blend, *, sinks: int = 1, recent: int = 2) -> GateTraining:
    return GateTraining(tiny_decoder(), sinks=sinks, recent=recent, blend=blend)


def at(found: GateTraining, gates: Tensor) -> Tensor:
    return found.distance(batch().inputs, batch().targets, gates)


@pytest.mark.parametrize("blend", BLENDS)
def test_open_gates_change_nothing(blend: Blend) -> None:
    assert at(training(blend), torch.ones(3, 2, dtype=torch.float64)).item() < 1e-20


@pytest.mark.parametrize("blend", BLENDS)
def test_gradients_of_the_gates(blend: Blend) -> None:
    found = training(blend)
    found.model.requires_grad_(False)
    gates = torch.rand(3, 2, dtype=torch.float64).mul(0.8).add(0.1).requires_grad_()
    # wide steps: the model's norms work in single precision
    torch.autograd.gradcheck(lambda x: at(found, x), (gates,), eps=1e-2, atol=1e-4, rtol=1e-2)


def test_the_two_blends_differ_where_states_did_before() -> None:
    gates = torch.ones(3, 2, dtype=torch.float64)
    gates[2] = 0.4
    published, own = (at(training(blend), gates) for blend in BLENDS)
    torch.testing.assert_close(
        published, own, rtol=1e-6, atol=0
    )  # what the last layer reads agrees
    gates[2] = 1.0
    gates[0] = 0.4
    published, own = (at(training(blend), gates) for blend in BLENDS)
    published, own = (at(training(blend), gates) for blend in BLENDS)
    assert abs(published - own) > 1e-6 * own


def test_the_penalty_alone_closes_every_gate() -> None:
    seen: list[Moves] = []
    found = GateTraining(tiny_decoder(), sinks=0, recent=100)  # a stream that sees everything
    gates = found.run(repeat(batch()), 80, seen.append)
    assert gates.shape == (3, 2)
    assert gates.max() < 0.1
    assert [m.done for m in seen] == list(range(1, 81))
    assert max(m.distance for m in seen) < 1e-10


@pytest.mark.parametrize("blend", BLENDS)
def test_heads_that_need_the_past_stay_open(blend: Blend) -> None:
    """Every head of this model matters, so a stream of one token costs more than the penalty."""
    found = GateTraining(tiny_decoder(), sinks=0, recent=1, blend=blend)
    gates = found.run(repeat(batch()), 80)
    assert gates.mean() > 0.5


def broken() -> Iterator[Batch]:
    yield batch()
    raise RuntimeError("no more data")


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_decoder().train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = GateTraining(model, sinks=1, recent=2)
    with pytest.raises(RuntimeError, match="no more data"):
        found.run(broken(), 5)
    assert model.training
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.requires_grad == (name != "lm_head.weight")
        assert p.grad is None


def test_bad_training() -> None:
    with pytest.raises(ArgumentError, match="recent"):
        GateTraining(tiny_decoder(), recent=0)
    with pytest.raises(ArgumentError, match="blend"):
        GateTraining(tiny_decoder(), blend="other")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="causal"):
        GateTraining(tiny_encoder())
    with pytest.raises(UnsupportedError):
        GateTraining(torch.nn.Linear(2, 2))
    nothing = Batch(prompt(5), torch.full((1, 5), IGNORED))
    with pytest.raises(ArgumentError, match="some token to predict"):
        GateTraining(tiny_decoder()).run(repeat(nothing), 1)
    with pytest.raises(ArgumentError, match="1 steps for each process"):
        GateTraining(tiny_decoder()).run(iter(()), 1)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (4, 2), (32, 8)])
def test_streaming_heads_are_those_below_the_quantile(
    sparsity: float, shape: tuple[int, int]
) -> None:
    gates = torch.rand(shape, dtype=torch.float64)
    threshold = gates.flatten().quantile(sparsity)
    assert torch.equal(streaming_heads(gates, sparsity), gates < threshold)


def test_ties_go_by_layer_and_head() -> None:
    gates = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.5, 1.3]])
    expected = {0.2: [1], 0.4: [1, 2], 0.6: [1, 2, 3], 1.0: [0, 1, 2, 3, 4, 5]}
    for sparsity, heads in expected.items():
        found = streaming_heads(gates, sparsity).flatten().nonzero().flatten().tolist()
        assert found == heads
    assert streaming_heads(gates, 0.0).sum() == 0
    assert streaming_heads(gates, 0.99).flatten().tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan")])
def test_bad_sparsity(sparsity: float) -> None:
    with pytest.raises(ArgumentError, match="sparsity"):
        plan_from_gates(torch.ones(3, 2), sparsity)


def test_the_plan_streams_the_lowest_gates() -> None:
    gates = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.7, 0.6]])
    plan = plan_from_gates(gates, 0.5, sinks=2, recent=4)
    where = [(step.layers, step.kv_heads) for step in plan.steps]
    assert where == [((0, 1), (0,)), ((2,), (1,))]
    assert type(plan).read(plan.text()) == plan
    model = tiny_decoder()
    with plan.applied(model) as run, torch.no_grad():
        model(prompt(20), use_cache=True)
        layers: list[dict[str, Any]] = run.report()["layers"]
    kept = {(n, tuple(b["heads"])): b["keys"] for n, x in enumerate(layers) for b in x["buckets"]}
    assert kept[0, (0,)] == kept[2, (1,)] == 2 + 4 - 1  # the next token is the fourth recent one
    assert kept[0, (1,)] == kept[2, (0,)] == 20


def test_no_gate_below_the_quantile_means_no_step() -> None:
    assert plan_from_gates(torch.rand(3, 2), 0.0).steps == ()
