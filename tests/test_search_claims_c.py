"""Pruning, quantising and tuning: what their studies rest on."""

from __future__ import annotations

from dataclasses import replace
from itertools import repeat
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import Qwen2Config, Qwen2ForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

from regard.core.errors import ArgumentError
from regard.core.linears import blocks_of, weight_of
from regard.recipes.losses import of_task, soft_loss
from regard.recipes.rsq import rsq
from regard.recipes.token_importance import Ends
from regard.recipes.tuning import tuned
from regard.searchers.amp import sizes
from regard.searchers.information_gates import multiplied
from regard.searchers.judging import judged
from regard.searchers.slimming import Kept, everything, parameters_of, slim
from regard.searchers.vtrans import Bottleneck, Gating, vtrans
from regard.studies.searching.needles import pocket, questions
from regard.studies.searching.random_parts import random_models
from regard.tasks.text import Text
from regard.testing.tiny import SHAPE, prompt, tiny_decoder

IDS = prompt(14, batch=2)
BATCH = {"input_ids": IDS}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**BATCH).logits


def test_random_models_have_the_shape_that_is_asked() -> None:
    model = tiny_decoder()
    units = (tuple(range(0, 48, 3)),) * 3
    like = Kept(((0, 1), (2, 3), (0, 1)), units, layers=(0, 2), channels=tuple(range(20)))
    wanted = parameters_of(slim(model, like))
    found = list(random_models(model, like, 3, seed=1))
    assert [parameters_of(one) for one in found] == [wanted] * 3
    assert not torch.equal(logits(found[0]), logits(found[1]))
    again = next(random_models(model, like, 1, seed=1))
    assert torch.equal(logits(found[0]), logits(again))


def test_a_head_is_as_large_as_its_part_of_the_projection() -> None:
    model = tiny_decoder()
    before = sizes(model, [BATCH]).heads
    with torch.no_grad():
        last = weight_of(blocks_of(model)[-1].joined)
        last[:, : last.shape[1] // 4] *= 3
    after = sizes(model, [BATCH]).heads
    torch.testing.assert_close(after[-1, 0], 3 * before[-1, 0])
    torch.testing.assert_close(after[-1, 1:], before[-1, 1:])


def test_a_configuration_without_the_width_of_heads_loses_channels() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=2)).eval()
    small = slim(model, replace(everything(model), channels=tuple(range(0, 32, 2))))
    assert (small.config.hidden_size, small.config.head_dim) == (16, 8)
    assert logits(small).isfinite().all()


def test_layers_that_stay_keep_what_a_configuration_lists_of_them() -> None:
    more = {"num_hidden_layers": 4, "no_rope_layer_interval": 2, "num_key_value_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmolLM3ForCausalLM(SmolLM3Config(**{**SHAPE, **more, **tokens})).double().eval()
    small = slim(model, replace(everything(model), layers=(1, 2, 3)))
    with torch.no_grad():
        first = blocks_of(model)[0]
        for module in (first.joined, first.back):
            weight_of(module).zero_()
    torch.testing.assert_close(logits(small), logits(model))


def test_gates_shut_units_before_the_heads_that_retrieve() -> None:
    pytest.importorskip("accelerate")
    model = pocket()
    lessons = of_task(Text(64).batches("train", 4, 0))
    small = vtrans(model, lessons, 60, 0.3, variant="faster", options=Bottleneck(gate_rate=0.1))
    asked = questions(128, 8, "test", 0)
    assert -judged(small.model, asked, "loss") < 1


def test_a_teachers_predictions_have_a_temperature() -> None:
    model, teacher = tiny_decoder(), tiny_decoder(seed=2)
    lesson = Gating(model, teacher, Bottleneck(temperature=3.0), 0.3, 1, 0)
    found = lesson(BATCH)["soft"]
    again = Gating(model, teacher, Bottleneck(), 0.3, 1, 0)
    with multiplied(model, blocks_of(model), again.gates.drawn(2)):
        student = logits(model)
    real = torch.ones_like(IDS, dtype=torch.bool)
    torch.testing.assert_close(found.detach(), soft_loss(student, logits(teacher), real, 3.0))


def test_first_and_last_tokens() -> None:
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, :2] = False
    found = Ends(1, 2).importance(real).bool() & real
    assert found.int().tolist() == [[1, 0, 0, 0, 1, 1], [0, 0, 1, 0, 1, 1]]
    model = tiny_decoder()
    ends = rsq(model, [BATCH], importance=Ends(4))
    assert not torch.equal(logits(ends), logits(rsq(model, [BATCH], importance="uniform")))
    every = rsq(model, [BATCH], importance=Ends(14))
    torch.testing.assert_close(logits(every), logits(rsq(model, [BATCH], importance="uniform")))
    for wrong in ((0, 0), (-1, 2)):
        with pytest.raises(ArgumentError, match="first, last"):
            Ends(*wrong)


def test_a_rate_of_zero_is_refused() -> None:
    pytest.importorskip("accelerate")
    with pytest.raises(ArgumentError, match="rate"):
        tuned(tiny_decoder(), repeat(BATCH), 1, rate=0.0)
