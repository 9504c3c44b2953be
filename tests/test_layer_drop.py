"""Dropping sub-layers, and the measure that chooses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import GROUPED
from torch import Tensor

from regard.core.errors import ArgumentError, UnsupportedError
from regard.importance.layer_similarity import dropped, dropped_in_turn, similarities, similarity
from regard.plan import Plan, PlanError, Step
from regard.recipes.layer_similarity import drop_plan, least_needed, sublayer_similarity
from regard.testing.compare import close, same
from regard.testing.tiny import prompt, tiny_decoder

transformers = pytest.importorskip("transformers")


def logits(model: Any, plan: Plan, ids: Tensor) -> Tensor:
    with plan.applied(model), torch.no_grad():
        return model(ids, use_cache=False).logits


def idle(model: Any, layer: int, part: str) -> None:
    """Make one sub-layer give nothing."""
    block = model.model.layers[layer]
    module = block.self_attn.o_proj if part == "attention" else block.mlp.down_proj
    with torch.no_grad():
        module.weight.zero_()


def test_an_idle_layer_is_found_and_dropping_it_changes_nothing() -> None:
    model, ids = tiny_decoder(), prompt(12, batch=2)
    idle(model, 1, "attention")
    found = sublayer_similarity(model, [{"input_ids": ids}])
    close(found["attention"][1], torch.ones(()).double(), "similarity", 1e-12)
    assert (found["attention"][[0, 2]] < 0.999).all()
    plan = least_needed(model, [{"input_ids": ids}], 1)
    assert plan.steps[0].layers == (1,)
    close(logits(model, plan, ids), logits(model, Plan(), ids), "dropped", 1e-12)


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_dropping_is_a_zero_output(part: str) -> None:
    model, ids = tiny_decoder(), prompt(12)
    got = logits(model, drop_plan(((part, 0), (part, 2))), ids)
    idle(model, 0, part)
    idle(model, 2, part)
    close(got, logits(model, Plan(), ids), part, 1e-12)


def test_both_is_attention_and_mlp() -> None:
    model, ids = tiny_decoder(), prompt(12)
    both = Step(treatment="layer_drop", options={"sublayer": "both"}, layers=(1,))
    expected = logits(model, drop_plan((("attention", 1), ("mlp", 1))), ids)
    same(logits(model, Plan(steps=(both,)), ids), expected, "both")


def test_a_joint_list_takes_from_either() -> None:
    model, ids = tiny_decoder(), prompt(12)
    idle(model, 2, "attention")
    idle(model, 0, "mlp")
    plan = least_needed(model, [{"input_ids": ids}], 2, sublayers=("attention", "mlp"))
    chosen = {(s.options["sublayer"], s.layers) for s in plan.steps}
    assert chosen == {("attention", (2,)), ("mlp", (0,))}


def test_dropped_layers_hold_no_cache() -> None:
    model, ids = tiny_decoder(), prompt(12)
    with drop_plan((("attention", 0), ("attention", 2))).applied(model) as run, torch.no_grad():
        out = model(ids, use_cache=True)
        model(ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
        report = run.report()
    assert [bool(layer["buckets"]) for layer in report["layers"]] == [False, True, False]
    assert [layer["seen"] for layer in report["layers"]] == [13, 13, 13]


def test_the_measure_is_a_cosine_per_token_over_real_ones() -> None:
    before, after = torch.randn(2, 5, 8).double(), torch.randn(2, 5, 8).double()
    real = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    rows = [(0, t) for t in range(5)] + [(1, t) for t in range(2)]
    each = [(before[i] @ after[i]) / (before[i].norm() * after[i].norm()) for i in rows]
    close(similarity(before, after, real), torch.stack(each).mean(), "mean", 1e-12)
    after[~real] = torch.nan
    assert similarity(before, after, real).isfinite()


def test_rotating_the_stream_does_not_matter() -> None:
    stream = [torch.randn(2, 5, 8).double() for _ in range(4)]
    turn = torch.linalg.qr(torch.randn(8, 8).double()).Q
    close(similarities([x @ turn for x in stream]), similarities(stream), "rotated", 1e-12)
    with pytest.raises(ArgumentError, match="two states"):
        similarities(stream[:1])


def test_batches_weigh_by_their_real_tokens() -> None:
    model, ids = tiny_decoder(), prompt(12, batch=2)
    short = ids[1:, :7]
    padded = torch.ones_like(ids)
    padded[1, 7:] = 0
    together = sublayer_similarity(model, [{"input_ids": ids, "attention_mask": padded}])
    apart = sublayer_similarity(model, [{"input_ids": ids[:1]}, {"input_ids": short}])
    for part, found in together.items():
        close(found, apart[part], part, 1e-9)


def test_in_turn_asks_again() -> None:
    """After the first drop the second layer becomes the one that does nothing."""

    def measure(gone: Any) -> dict[str, Tensor]:
        return {"attention": torch.tensor([0.9, 0.2, 0.5] if not gone else [0.9, 0.8, 0.5])}

    assert dropped_in_turn(measure, 2) == (("attention", 0), ("attention", 1))
    assert dropped(measure(()), 2) == (("attention", 0), ("attention", 2))
    with pytest.raises(ArgumentError, match="count"):
        dropped(measure(()), 4)


def test_in_turn_on_a_model() -> None:
    model, ids = tiny_decoder(), prompt(12)
    plan = least_needed(model, [{"input_ids": ids}], 2, in_turn=True)
    assert len(plan.steps[0].layers) == 2


def test_half_a_layer_cannot_be_dropped() -> None:
    step = Step(treatment="layer_drop", layers=(0,), heads=(0, 1))
    with pytest.raises(ArgumentError, match="all 4 heads"):
        Plan(steps=(step,)).resolve(tiny_decoder())
    with pytest.raises(PlanError):
        drop_plan((("attention", 7),)).resolve(tiny_decoder())


def test_blocks_that_normalise_after_are_refused() -> None:
    config = transformers.Gemma2Config(
        **GROUPED,
        head_dim=8,
        initializer_range=0.5,
    )
    model = transformers.Gemma2ForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "post_attention_layernorm" in name:
                x.fill_(1.0)
    with pytest.raises(UnsupportedError, match="pre-norm"):
        sublayer_similarity(model, [{"input_ids": prompt(12)}])


def test_no_text_is_no_measure() -> None:
    with pytest.raises(ArgumentError, match="batches"):
        sublayer_similarity(tiny_decoder(), [])
