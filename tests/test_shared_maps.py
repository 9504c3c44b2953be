"""Layers that use another layer's attention weights, and the measure that groups them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import GROUPED
from torch import Tensor

from regard.core.errors import ArgumentError, UnsupportedError
from regard.importance.map_similarity import alike, map_similarity
from regard.plan import Plan, Step
from regard.recipes.map_similarity import layer_map_similarity, shared_plan
from regard.testing.compare import close
from regard.testing.tiny import prompt, tiny_decoder

transformers = pytest.importorskip("transformers")


def shared(layers: Any = "all", block: int | None = None, **where: Any) -> Step:
    return Step(treatment="shared_maps", options={"block": block}, layers=layers, **where)


def observed(model: Any, ids: Tensor, *steps: Step) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits, and per layer the values (B,H_k,N,E) and what enters the output projection."""
    values: list[Tensor] = []
    outputs: list[Tensor] = []
    handles = []
    for layer in model.model.layers:
        attention = layer.self_attn
        handles.append(attention.v_proj.register_forward_hook(lambda m, a, y: values.append(y)))
        handles.append(
            attention.o_proj.register_forward_pre_hook(lambda m, a: outputs.append(a[0]))
        )
    with Plan(steps=steps).applied(model), torch.no_grad():
        logits = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return (
        logits,
        [x.unflatten(-1, (2, -1)).transpose(1, 2) for x in values],
        [x.unflatten(-1, (4, -1)).transpose(1, 2) for x in outputs],
    )


def first_map(ids: Tensor) -> Tensor:
    """The first layer's own weights (B,4,N,N); the library normalises them in float32."""
    model = tiny_decoder()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(ids, output_attentions=True, use_cache=False).attentions[0]


def test_followers_apply_the_first_map_to_their_values() -> None:
    ids = prompt(12, batch=2)
    _, values, outputs = observed(tiny_decoder(), ids, shared())
    weights = first_map(ids)
    for layer in (1, 2):
        expected = weights @ values[layer].repeat_interleave(2, 1)
        close(outputs[layer], expected, f"layer {layer}", 1e-6)


def test_heads_that_are_not_chosen_keep_their_maps() -> None:
    ids = prompt(12)
    _, values, outputs = observed(tiny_decoder(), ids, shared(heads=(1, 2)))
    _, _, plain = observed(tiny_decoder(), ids)
    expected = first_map(ids) @ values[1].repeat_interleave(2, 1)
    close(outputs[1][:, 1:3], expected[:, 1:3], "followers", 1e-6)
    close(outputs[1][:, [0, 3]], plain[1][:, [0, 3]], "others", 1e-9)


def test_another_step_on_some_heads_regroups_them() -> None:
    """A layer whose heads are cut differently still finds the map of each."""
    ids = prompt(12)
    hot = Step(treatment="initial_token", options={"gamma": 3.0}, layers=(0,), heads=(3,))
    _, values, outputs = observed(tiny_decoder(), ids, hot, shared())
    weights = first_map(ids).clone()
    weights[:, 3, :, 0] *= 3
    weights /= weights.sum(-1, keepdim=True)
    close(outputs[1], weights @ values[1].repeat_interleave(2, 1), "regrouped", 1e-6)


def test_same_projections_and_inputs_give_the_same_output() -> None:
    """Where the layers between add nothing and compute the same map, sharing changes nothing."""
    model, ids = tiny_decoder(), prompt(12)
    first, second = (model.model.layers[i] for i in (0, 1))
    with torch.no_grad():
        first.self_attn.o_proj.weight.zero_()
        first.mlp.down_proj.weight.zero_()
        for name in ("q_proj", "k_proj"):
            source = getattr(first.self_attn, name).weight
            getattr(second.self_attn, name).weight.copy_(source)
    plain, _, _ = observed(model, ids)
    close(observed(model, ids, shared("0-1"))[0], plain, "same maps", 1e-9)


@pytest.mark.parametrize(("block", "leaders"), [(2, (0, 2)), (None, (0,)), (3, (0,))])
def test_blocks_have_one_leader_each(block: int | None, leaders: tuple[int, ...]) -> None:
    """Followers do not read their queries."""
    model, ids = tiny_decoder(), prompt(12)
    before, _, _ = observed(model, ids, shared(block=block))
    for layer in range(3):
        changed = tiny_decoder()
        with torch.no_grad():
            changed.model.layers[layer].self_attn.q_proj.weight.mul_(2.0)
        after, _, _ = observed(changed, ids, shared(block=block))
        assert torch.equal(before, after) == (layer not in leaders)


def test_evicted_keys_cannot_be_shared() -> None:
    model, ids = tiny_decoder(), prompt(20)
    stream = Step(treatment="stream", options={"sinks": 2, "recent": 6})
    with Plan(steps=(stream, shared())).applied(model), torch.no_grad():
        out = model(ids, use_cache=True)
        with pytest.raises(UnsupportedError, match="evicted"):
            model(ids[:, :1], past_key_values=out.past_key_values, use_cache=True)


def test_a_window_cannot_follow_full_attention() -> None:
    config = transformers.Gemma2Config(
        **GROUPED,
        head_dim=8,
        sliding_window=4,
    )
    model = transformers.Gemma2ForCausalLM(config).double().eval()
    plan = Plan(steps=(shared(),))
    with (
        plan.applied(model),
        torch.no_grad(),
        pytest.raises(UnsupportedError, match="other keys"),
    ):
        model(prompt(12), use_cache=False)


def test_similarity_is_one_on_the_diagonal_and_symmetric() -> None:
    maps = [torch.rand(2, 3, 6, 6).softmax(-1) for _ in range(4)]
    maps[2] = maps[1].clone()
    found = map_similarity(maps)
    close(found.diagonal(), torch.ones(4), "diagonal", 1e-6)
    close(found, found.T, "symmetric", 1e-6)
    close(found[1, 2], torch.ones(()), "identical layers", 1e-6)
    close(map_similarity([x[:, [2, 0, 1]] for x in maps]), found, "order of heads", 1e-6)
    with pytest.raises(ArgumentError, match="shape"):
        map_similarity([maps[0], maps[1][:, :2]])


def test_padded_queries_do_not_count() -> None:
    maps = [torch.rand(1, 3, 6, 6).softmax(-1) for _ in range(2)]
    real = torch.tensor([[False, False, True, True, True, True]])
    found = map_similarity(maps, real)
    for x in maps:
        x[:, :, :2] = torch.nan
    close(map_similarity(maps, real), found, "padding", 1e-6)


def test_the_measure_of_a_model_and_its_plan() -> None:
    model, ids = tiny_decoder(), prompt(12, batch=2)
    with torch.no_grad():
        first, second = (model.model.layers[i].self_attn for i in (0, 1))
        first.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        second.q_proj.weight.copy_(first.q_proj.weight)
        second.k_proj.weight.copy_(first.k_proj.weight)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    found = layer_map_similarity(model, [{"input_ids": ids, "attention_mask": mask}])
    assert found.shape == (3, 3)
    assert found[0, 1] > 1 - 1e-6 > found[1, 2]
    apart = [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :8]}]
    close(found, layer_map_similarity(model, apart), "padding", 1e-6)
    plan = shared_plan(alike(found, 0.999, skip_first=0, skip_last=0))
    assert [step.layers for step in plan.steps] == [(0, 1)]
    with pytest.raises(ArgumentError, match="batches"):
        layer_map_similarity(model, [])


def test_blocks_are_contiguous_inner_layers_that_all_agree() -> None:
    likeness = torch.full((7, 7), 0.1)
    for group in ([0, 1], [1, 2, 3], [4, 5, 6]):
        for i in group:
            likeness[i, group] = 0.9
    assert alike(likeness, 0.8) == ((1, 2, 3), (4, 5))
    assert alike(likeness, 0.8, skip_first=0, skip_last=0) == ((0, 1), (2, 3), (4, 5, 6))
    assert alike(likeness, 0.95) == ()
    with pytest.raises(ArgumentError, match="similarities"):
        alike(likeness[:3], 0.8)
    with pytest.raises(ArgumentError, match="skip_first"):
        alike(likeness, 0.8, skip_first=-1)
