"""Patching between prompts by known answers, circuits and their overlap, arithmetic heads."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.maps import treated_maps
from regard.core.passage import Passage
from regard.core.scene import Scene
from regard.probes.activation_patching import ActivationPatching
from regard.probes.arithmetic import Arithmetic, accuracy_without, key_heads
from regard.probes.circuits import circuit_overlap, in_circuit
from regard.probes.path_patching import PathPatching
from regard.testing.compare import close
from regard.testing.tiny import SHAPE, prompt, tiny_decoder
from regard.treatments.attend_to import AttendTo
from regard.treatments.swap_columns import SwapColumns

transformers = pytest.importorskip("transformers")
N, WIDTH, HEADS, LAYERS = 10, 8, 4, 3


def pair(batch: int = 2) -> Passage:
    """A passage and its contrast."""
    ids, other = prompt(N, batch=batch), prompt(N, batch=batch, seed=9)
    right, wrong = prompt(batch, seed=4)[0], prompt(batch, seed=6)[0]
    return Passage(
        {"input_ids": ids}, ids, answer=right[:, None], wrong=wrong, contrast={"input_ids": other}
    )


def shifts(probe: Any, model: Any, passage: Passage, metric: str) -> Tensor:
    """What an experiment finds in one passage: (B, layers, H)."""
    found = probe.run(Scene.of(model, [passage]))
    return torch.stack([finding.metrics[metric] for _, _, finding in found], 1)


def ungrouped() -> Any:
    """A decoder in which every head has its own keys; in float64, norms excepted."""
    config = transformers.LlamaConfig(**SHAPE, num_key_value_heads=HEADS)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return transformers.LlamaForCausalLM(config).double().eval()


def linear_after_attention(model: Any) -> None:
    """Leave out what is not linear in what heads give at the last token."""
    model.model.norm = nn.Identity()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.zero_()


@pytest.mark.parametrize(
    "probe",
    [PathPatching(), PathPatching(freeze_mlps=True), PathPatching(((2, 1, "q"),))],
)
def test_the_same_prompt_moves_nothing(probe: PathPatching) -> None:
    passage = pair()
    same = replace(passage, contrast=passage.inputs)
    moved = shifts(probe, tiny_decoder(), same, "path_shift").nan_to_num(0.0)
    assert float(moved.abs().max()) < 1e-9
    assert shifts(probe, tiny_decoder(), same, "path_effect").isnan().all()
    still = shifts(ActivationPatching(), tiny_decoder(), same, "patch_shift")
    assert float(still.abs().max()) < 1e-9


def head_inputs(model: Any, ids: Tensor) -> list[Tensor]:
    """What enters each output projection at the last token, (B,H*E) per layer."""
    found: list[Tensor] = []
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a: found.append(a[0][:, -1]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


def test_direct_effects_are_linear_where_the_model_is() -> None:
    """Each is the head's change, projected, on the answers' rows of the unembedding."""
    model, passage = tiny_decoder(), pair()
    linear_after_attention(model)
    before, after = (
        head_inputs(model, ids) for ids in (passage.tokens, passage.contrast["input_ids"])
    )
    rows = model.lm_head.weight
    direction = rows[passage.answer[:, 0]] - rows[passage.wrong]  # (B,C)
    found = shifts(PathPatching(), model, passage, "path_shift")
    for layer, block in enumerate(model.model.layers):
        change = (after[layer] - before[layer]).unflatten(-1, (HEADS, WIDTH))
        slices = block.self_attn.o_proj.weight.unflatten(-1, (HEADS, WIDTH))
        expected = torch.einsum("bhe,che,bc->bh", change, slices, direction)
        close(found[:, layer], expected, f"layer {layer}", 1e-9)


def test_the_whole_effect_is_the_sum_of_direct_ones_in_a_linear_model() -> None:
    """One layer, nothing after it but the unembedding: the scores of its heads sum to what the
    contrast does, less what the token itself changes.
    """
    model, passage = tiny_decoder(), pair()
    linear_after_attention(model)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    ids = passage.tokens.clone()
    ids[:, :-1] = passage.contrast["input_ids"][:, :-1]
    passage = replace(passage, contrast={"input_ids": ids})
    effects = shifts(PathPatching(), model, passage, "path_effect")
    assert float(effects.sum(-1).mean()) == pytest.approx(1.0, abs=1e-6)


class Hooks:
    """Path patching to another head's query, once more, by hooks on the projections alone."""

    def __init__(self, model: Any, ids: Tensor, other: Tensor) -> None:
        self.model, self.ids = model, ids
        self.clean, self.contrast = (head_inputs(model, x) for x in (ids, other))

    def query(self, sender: tuple[int, int], layer: int) -> Tensor:
        """The queries of a layer at the last token when only the sender changes."""
        held: list[Tensor] = []
        handles = []
        for index, block in enumerate(self.model.model.layers):
            values = self.clean[index].clone()
            if index == sender[0]:
                mine = slice(WIDTH * sender[1], WIDTH * (sender[1] + 1))
                values[:, mine] = self.contrast[index][:, mine]

            def put(m: Any, args: Any, values: Tensor = values) -> Any:
                changed = args[0].clone()
                changed[:, -1] = values
                return (changed,)

            handles.append(block.self_attn.o_proj.register_forward_pre_hook(put))
        target = self.model.model.layers[layer].self_attn.q_proj
        handles.append(target.register_forward_hook(lambda m, a, y: held.append(y[:, -1])))
        return self._run(handles, held)

    def delivered(self, query: Tensor, layer: int, head: int) -> Tensor:
        """Logits after the last token when one head has this query."""
        mine = slice(WIDTH * head, WIDTH * (head + 1))

        def put(m: Any, args: Any, output: Tensor) -> Tensor:
            changed = output.clone()
            changed[:, -1, mine] = query[:, mine]
            return changed

        target = self.model.model.layers[layer].self_attn.q_proj
        return self._run([target.register_forward_hook(put)], [])

    def _run(self, handles: list[Any], held: list[Tensor]) -> Tensor:
        with torch.no_grad():
            logits = self.model(self.ids).logits[:, -1]
        for handle in handles:
            handle.remove()
        return held[0] if held else logits


def test_a_query_receives_as_hooks_on_the_projections_say() -> None:
    model, passage = tiny_decoder(), pair()
    by_hand = Hooks(model, passage.tokens, passage.contrast["input_ids"])
    found = shifts(PathPatching(((2, 1, "q"),)), model, passage, "path_shift")
    rows = torch.arange(2)

    def gap(logits: Tensor) -> Tensor:
        return logits[rows, passage.answer[:, 0]] - logits[rows, passage.wrong]

    with torch.no_grad():
        plain = gap(model(passage.tokens).logits[:, -1])
    for sender in ((0, 0), (0, 3), (1, 2)):
        logits = by_hand.delivered(by_hand.query(sender, 2), 2, 1)
        close(found[:, sender[0], sender[1]], gap(logits) - plain, str(sender), 1e-6)
    assert float(found[:, 2, [0, 2, 3]].abs().max()) < 1e-9, (
        "its layer's other heads do not reach it"
    )


@pytest.mark.parametrize("component", ["q", "k", "v", "z"])
def test_every_component_receives(component: Any) -> None:
    model, passage = ungrouped(), pair()
    found = shifts(PathPatching(((2, 0, component),), position=4), model, passage, "path_shift")
    assert found[:, 2, 0].isnan().all(), "a receiver does not send"
    reaches = float(found[:, 0].abs().max()) > 1e-6
    assert reaches == (component in ("k", "v")), "of earlier tokens only these are read"
    last = shifts(PathPatching(((2, 0, component),)), model, passage, "path_shift")
    assert float(last[:, 0].abs().max()) > 1e-6


def test_the_last_layer_has_direct_paths_alone() -> None:
    model, passage = tiny_decoder(), pair()
    direct = shifts(PathPatching(), model, passage, "path_shift")
    every = shifts(ActivationPatching(position=-1), model, passage, "patch_shift")
    close(direct[:, -1], every[:, -1], "last layer", 1e-9)
    assert not torch.allclose(direct[:, 0], every[:, 0], rtol=1e-3)


def test_frozen_feed_forward_parts_say_what_they_said() -> None:
    """Then even a model with them is linear up to the final norm."""
    model, passage = tiny_decoder(), pair()
    model.model.norm = nn.Identity()
    found = shifts(PathPatching(freeze_mlps=True), model, passage, "path_shift")
    before, after = (
        head_inputs(model, ids) for ids in (passage.tokens, passage.contrast["input_ids"])
    )
    rows = model.lm_head.weight
    direction = rows[passage.answer[:, 0]] - rows[passage.wrong]
    change = (after[0] - before[0]).unflatten(-1, (HEADS, WIDTH))
    slices = model.model.layers[0].self_attn.o_proj.weight.unflatten(-1, (HEADS, WIDTH))
    close(found[:, 0], torch.einsum("bhe,che,bc->bh", change, slices, direction), "first", 1e-9)


def test_what_cannot_be_patched_is_refused() -> None:
    model, passage = tiny_decoder(), pair()

    def first(probe: Any, passage: Passage = passage) -> Any:
        return next(iter(probe.run(Scene.of(model, [passage]))))

    with pytest.raises(UnsupportedError, match="contrast"):
        first(PathPatching(), replace(passage, contrast=None))
    with pytest.raises(UnsupportedError, match="wrong"):
        first(PathPatching(), replace(passage, wrong=None))
    with pytest.raises(ArgumentError, match="contrast"):
        first(PathPatching(), replace(passage, contrast={"input_ids": prompt(N + 1, batch=2)}))
    with pytest.raises(UnsupportedError, match="share"):
        first(PathPatching(((1, 0, "k"),)))
    with pytest.raises(ArgumentError, match="receivers"):
        first(PathPatching(((5, 0, "q"),)))
    with pytest.raises(ArgumentError, match="position"):
        PathPatching(position=3)
    with pytest.raises(ArgumentError, match="position"):
        first(ActivationPatching(position=N))


def test_circuits() -> None:
    scores = torch.zeros(10, 10)
    scores[3, 4], scores[7, 1], scores[2, 2] = 0.5, -0.9, 0.1
    scores[0, 0] = torch.nan
    assert in_circuit(scores) == {(3, 4), (7, 1)}
    assert in_circuit(scores, 0.001) == {(7, 1)}
    heads = [(layer, head) for layer in range(4) for head in range(8)]
    assert circuit_overlap(heads[:29], heads[4:32]) == 25 / 32
    assert circuit_overlap(heads, heads) == 1
    for wrong in (0.0, 1.5):
        with pytest.raises(ArgumentError, match="share"):
            in_circuit(scores, wrong)
    with pytest.raises(ArgumentError, match="scores"):
        in_circuit(scores[0])
    with pytest.raises(ArgumentError, match="circuits"):
        circuit_overlap([], [])


def planted() -> tuple[Any, Passage]:
    """A linear model in which head 1.3 alone holds up the answer, and says nothing of it in the
    contrast.
    """
    model, passage = tiny_decoder(), pair()
    linear_after_attention(model)
    before = head_inputs(model, passage.tokens)[1][:, 3 * WIDTH : 4 * WIDTH]
    after = head_inputs(model, passage.contrast["input_ids"])[1][:, 3 * WIDTH : 4 * WIDTH]
    source = torch.linalg.lstsq(
        torch.cat([before, after]), torch.tensor([[1.0], [1], [0], [0]]).double()
    )
    rows = model.lm_head.weight
    answer = rows[passage.answer[:1, 0]]
    passage = replace(passage, answer=passage.answer[:1].expand(2, 1))
    projection = model.model.layers[1].self_attn.o_proj.weight
    with torch.no_grad():
        projection[:, 3 * WIDTH :] = 1e3 * answer.T @ source.solution.T
        model.model.layers[2].self_attn.o_proj.weight.zero_()
    return model, passage


def test_a_planted_arithmetic_head_is_found_and_needed() -> None:
    model, passage = planted()
    scene = Scene.of(model, [passage])
    effects = shifts(Arithmetic(), model, passage, "direct_effect").mean(0)
    assert key_heads(effects) == [(1, 3)]
    assert float(effects[1, 3]) == pytest.approx(-1.0, abs=0.05)
    assert accuracy_without(scene, []) == 1.0
    assert accuracy_without(scene, [(1, 3)]) == 0.0
    assert accuracy_without(scene, [(0, 1), (1, 0), (2, 2)]) == 1.0
    with pytest.raises(ArgumentError, match="heads"):
        accuracy_without(scene, [(0, 9)])


def test_the_mean_of_what_it_gives_anyway_changes_no_answer() -> None:
    model, passage = planted()
    alone = replace(
        passage,
        inputs={"input_ids": passage.tokens[:1]},
        tokens=passage.tokens[:1],
        answer=passage.answer[:1],
        contrast={"input_ids": passage.tokens[:1]},
    )
    every = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    assert accuracy_without(Scene.of(model, [alone]), every) == 1.0


def test_scores_do_not_hang_on_a_prompt_that_barely_moves() -> None:
    """They are shares of the mean effect of all contrasts, not means of shares."""
    model, moving = tiny_decoder(), pair(1)
    still = replace(moving, contrast=moving.inputs)
    found = list(PathPatching().run(Scene.of(model, [moving, still])))
    alone = list(PathPatching().run(Scene.of(model, [moving])))
    ours = torch.stack([f.metrics["path_effect"] for _, _, f in found])
    assert ours.isfinite().all()
    mean = (ours[:LAYERS] + ours[LAYERS:]) / 2
    close(mean, torch.stack([f.metrics["path_effect"] for _, _, f in alone]), "mean", 1e-6)
    assert not math.isnan(float(mean.sum()))


@pytest.mark.parametrize("queries", ["last", "every"])
def test_swapping_keeps_sums_and_swaps_back(queries: Any) -> None:
    maps = torch.rand(2, HEADS, N, N).double().tril()
    maps = maps / maps.sum(-1, keepdim=True)
    swap = SwapColumns(2, 5, queries)
    once = treated_maps(maps, swap)
    first = 5 if queries == "every" else N - 1
    close(once[:, :, :first], maps[:, :, :first], "rows that do not see both", 1e-12)
    order = [0, 1, 5, 3, 4, 2, *range(6, N)]
    close(once[:, :, first:], maps[:, :, first:][..., order], "swapped", 1e-9)
    close(treated_maps(once, swap), maps, "twice", 1e-9)
    with pytest.raises(ArgumentError, match="first"):
        SwapColumns(-1, 2)


def test_looking_at_given_keys_alone() -> None:
    maps = torch.rand(2, HEADS, N, N).double().tril()
    maps = maps / maps.sum(-1, keepdim=True)
    found = treated_maps(maps, AttendTo((3, 6)), heads=(1,))
    close(found[:, [0, 2, 3]], maps[:, [0, 2, 3]], "other heads", 1e-12)
    close(found[:, 1, :-1], maps[:, 1, :-1], "other rows", 1e-12)
    expected = torch.zeros(N).double()
    expected[[3, 6]] = 0.5
    close(found[0, 1, -1], expected, "the last row", 1e-9)
    every = treated_maps(maps, AttendTo((3, 6), "every"))
    close(every[0, 0, 4], torch.eye(N)[3].double(), "sees one of them", 1e-9)
    close(every[0, 0, 2], maps[0, 0, 2], "sees none of them", 1e-9)
    with pytest.raises(ArgumentError, match="positions"):
        AttendTo((-1,))
