"""Rotate, scale, quantise: each part against what it must leave alone or make better."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.linears import blocks_of, weight_of
from regard.recipes.gptq import Curvature, Grid, gptq, weighted_error
from regard.recipes.rotation import random_hadamard, rotated
from regard.recipes.rsq import rsq
from regard.recipes.token_importance import KINDS, received_by, shifted, token_importance
from regard.recipes.walking import Walk
from regard.testing.tiny import SHAPE, prompt, tiny_decoder, tiny_encoder

IDS = prompt(20, batch=3)
BATCH = {"input_ids": IDS}
SINGLE = 3e-5  # norms of transformers work in single precision


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits


def tied() -> Any:
    from transformers import LlamaConfig

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
        model = LlamaForCausalLM(config).double().eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model


# Rotation


@pytest.mark.parametrize("width", [1, 7, 8, 24, 96])
def test_rotations_are_orthogonal_and_spread(width: int) -> None:
    turn = random_hadamard(width, seed=2)
    torch.testing.assert_close(turn @ turn.mT, torch.eye(width, dtype=torch.float64))
    assert torch.equal(turn, random_hadamard(width, seed=2))
    if width == 8:
        torch.testing.assert_close(turn.abs(), torch.full_like(turn, 8**-0.5))


@pytest.mark.parametrize("make", [tiny_decoder, tied])
def test_rotation_leaves_the_logits(make: Any) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    found = rotated(model, seed=1)
    torch.testing.assert_close(logits(found), logits(model), atol=SINGLE, rtol=SINGLE)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    changed = found.get_input_embeddings().weight - model.get_input_embeddings().weight
    assert float(changed.detach().abs().max()) > 0.1


def test_rotation_spreads_an_outlier() -> None:
    model = tiny_decoder()
    with torch.no_grad():
        for one in blocks_of(model):
            weight_of(one.heads[0])[:, 3] *= 50
    largest = [
        float(weight_of(one.heads[0]).detach().abs().max())
        for made in (model, rotated(model))
        for one in blocks_of(made)
    ]
    assert max(largest[3:]) < min(largest[:3]) / 2


def test_a_rotated_model_that_shared_its_embedding_reloads(tmp_path: Path) -> None:
    found = rotated(tied())
    found.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(logits(again), logits(found), atol=1e-9, rtol=1e-9)


def test_other_norms_are_refused() -> None:
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    for model in (GPT2LMHeadModel(config), tiny_encoder()):
        with pytest.raises(UnsupportedError):
            rotated(model)
    with pytest.raises(UnsupportedError, match="together"):
        rsq(GPT2LMHeadModel(config).eval(), [BATCH], rotate=False)


# GPTQ


def drawn(seed: int = 0, rows: int = 12, width: int = 40, tokens: int = 200) -> tuple[Tensor, ...]:
    """A weight, and correlated inputs (1,N,I)."""
    source = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, dtype=torch.float64, generator=source)
    mix = torch.randn(width, width, dtype=torch.float64, generator=source)
    x = torch.randn(1, tokens, width, dtype=torch.float64, generator=source) @ mix
    return weight, x


def even(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.float64)


def curvature(x: Tensor, weights: Tensor) -> Tensor:
    found = Curvature(x.shape[-1])
    found.add(x, weights)
    return found.matrix


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_beats_rounding_to_the_nearest(bits: int, symmetric: bool) -> None:
    weight, x = drawn()
    h = curvature(x, even(x))
    grid = Grid.of(weight, bits, symmetric=symmetric)
    found = gptq(weight, h, grid)
    assert weighted_error(weight, found, h) < 0.7 * weighted_error(weight, grid.rounded(weight), h)
    torch.testing.assert_close(grid.rounded(found), found)
    assert max(len(row.unique()) for row in found) <= 2**bits


def test_blocks_of_columns_are_bookkeeping() -> None:
    weight, x = drawn()
    h, grid = curvature(x, even(x)), Grid.of(weight, 3)
    torch.testing.assert_close(gptq(weight, h, grid, block=7), gptq(weight, h, grid, block=128))


def test_inputs_that_are_not_correlated_are_rounded_to_the_nearest() -> None:
    weight, _ = drawn()
    grid = Grid.of(weight, 3)
    torch.testing.assert_close(
        gptq(weight, torch.eye(40, dtype=torch.float64), grid), grid.rounded(weight)
    )


def test_an_input_that_is_never_there_has_no_weight() -> None:
    weight, x = drawn()
    x[..., 4] = 0
    found = gptq(weight, curvature(x, even(x)), Grid.of(weight, 8))
    assert bool((found[:, 4] == 0).all())
    assert bool(found.isfinite().all())


def test_what_counts_more_errs_less() -> None:
    """Tokens of two kinds: each is better served by weights that favour it."""
    weight, first = drawn(0)
    _, second = drawn(1)
    x = torch.cat([first, second], 1)
    favour = torch.full((1, 400), 0.005, dtype=torch.float64)
    favour[:, :200] = 1.0
    grid = Grid.of(weight, 3)
    h = curvature(first, even(first))
    plain = weighted_error(weight, gptq(weight, curvature(x, even(x)), grid), h)
    favoured = weighted_error(weight, gptq(weight, curvature(x, favour), grid), h)
    assert favoured < 0.8 * plain


def test_tokens_without_weight_are_as_absent() -> None:
    weight, x = drawn()
    half = even(x)
    half[:, 100:] = 0
    h = curvature(x, half)
    torch.testing.assert_close(h / h.trace(), curvature(x[:, :100], half[:, :100]) / h.trace() * 2)
    grid = Grid.of(weight, 3)
    other = gptq(weight, curvature(x[:, :100], half[:, :100]), grid)
    torch.testing.assert_close(gptq(weight, h, grid), other)


def test_curvature_is_a_mean_over_sequences_and_real_tokens() -> None:
    _, x = drawn()
    both = Curvature(40)
    both.add(x, even(x))
    both.add(2 * x, even(x) * 7)
    alone = 2 * x[0].mT @ x[0]
    torch.testing.assert_close(both.matrix, (alone + 4 * alone) / 2)
    padded = torch.cat([torch.full((1, 3, 40), torch.nan, dtype=torch.float64), x], 1)
    real = torch.arange(203)[None] >= 3
    found = Curvature(40)
    found.add(padded, even(padded), real)
    torch.testing.assert_close(found.matrix, alone)
    with pytest.raises(ArgumentError, match="one sequence"):
        _ = Curvature(3).matrix


def test_clipping_is_no_worse() -> None:
    weight, _ = drawn()
    weight[0, 0] = 40.0
    plain, clipped = (Grid.of(weight, 3, clip=clip) for clip in (False, True))
    assert bool((clipped.error(weight) <= plain.error(weight)).all())
    assert clipped.scale[1] < plain.scale[1]
    with pytest.raises(ArgumentError, match="bits"):
        Grid.of(weight, 1)


# Importance


def test_attention_received_sums_to_heads_times_queries() -> None:
    found = received_by(tiny_decoder(), BATCH)
    assert len(found) == 3
    for mass in found.values():
        torch.testing.assert_close(mass.sum(-1), torch.full((3,), 80.0).double())


def test_attention_received_is_that_of_the_models_own_maps() -> None:
    model = tiny_decoder()
    found = list(received_by(model, BATCH).values())
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**BATCH, output_attentions=True).attentions
    for mass, weights in zip(found, maps, strict=True):
        torch.testing.assert_close(mass, weights.double().sum((1, 2)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_counts_for_nothing(kind: Any) -> None:
    model = tiny_decoder()
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    padded = {"input_ids": IDS, "attention_mask": mask}
    found = []
    with torch.no_grad():
        for batch in (padded, {"input_ids": IDS[:1, 6:]}):
            blocks = blocks_of(model)
            walk, received = Walk.of(model, blocks, batch), received_by(model, batch)
            found.append(token_importance(kind, walk, blocks[0], batch, received))
    torch.testing.assert_close(found[0][:1, 6:], found[1], atol=1e-5, rtol=1e-5)
    assert bool((found[0][0, :6] == found[0][0, 6:].min()).all())


def test_distances_to_the_others() -> None:
    model, blocks = tiny_decoder(), blocks_of(tiny_decoder())
    with torch.no_grad():
        walk = Walk.of(model, blocks_of(model), BATCH)
    found = token_importance("unlike", walk, blocks[0], BATCH, {})
    wanted = torch.cdist(walk.state, walk.state).square().mean(-1)
    torch.testing.assert_close(found, wanted)


def test_shifted_batches_turn_round() -> None:
    found = shifted([{"input_ids": torch.arange(6)[None]}], 3)
    assert [one["input_ids"][0].tolist() for one in found] == [
        [0, 1, 2, 3, 4, 5],
        [4, 5, 0, 1, 2, 3],
        [2, 3, 4, 5, 0, 1],
    ]
    with pytest.raises(ArgumentError, match="times"):
        shifted([BATCH], 0)


# The recipe


def test_a_walk_is_a_forward() -> None:
    model = tiny_decoder()
    blocks = blocks_of(model)
    with torch.no_grad():
        walk = Walk.of(model, blocks, BATCH)
        for one in blocks:
            walk.state = walk.through(one)
        wanted = model.model(**BATCH, output_hidden_states=True).last_hidden_state
        torch.testing.assert_close(model.model.norm(walk.state), wanted)


def test_many_bits_change_little_and_few_bits_more() -> None:
    model = tiny_decoder()
    before = copy.deepcopy(model.state_dict())
    errors = [
        float((logits(rsq(model, [BATCH], bits=bits)) - logits(model)).square().mean())
        for bits in (12, 6, 3)
    ]
    assert errors[0] < 1e-4 * float(logits(model).square().mean())
    assert errors == sorted(errors)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_weights_are_on_grids_and_the_model_is_of_its_kind(tmp_path: Path) -> None:
    model = tiny_decoder().float()
    found = rsq(model, [BATCH], bits=3)
    assert type(found) is type(model)
    for one in blocks_of(found):
        for module in one.all:
            assert max(len(row.unique()) for row in weight_of(module)) <= 8
    found.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(found))


def test_second_order_beats_rounding_alone_in_a_model() -> None:
    model = tiny_decoder()
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for one in blocks_of(rounded):
            for module in one.all:
                weight = weight_of(module)
                weight.copy_(Grid.of(weight, 4).rounded(weight))
    found = rsq(model, [BATCH], bits=4, importance="uniform", rotate=False)
    errors = [float((logits(m) - logits(model)).square().mean()) for m in (found, rounded)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("wrong", [{"bits": 1}, {"importance": "length"}, {"low": 2.0}])
def test_bad_input(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        rsq(tiny_decoder(), [BATCH], **wrong)
    with pytest.raises(ArgumentError):
        rsq(tiny_decoder(), [])
