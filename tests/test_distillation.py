"""Distillation and tuning: what a student learns of a teacher, through accelerate."""

from __future__ import annotations

import copy
import math
import sys
from itertools import repeat
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import LlamaConfig, LlamaForCausalLM

from regard.core.errors import ArgumentError, UnsupportedError
from regard.recipes.echo_att import Weights, echo_att, followers, like_blocks, spared
from regard.recipes.losses import hard_loss, soft_loss, targets_of
from regard.recipes.low_rank import low_rank
from regard.recipes.minilm import Minilm, assistant_of, minilm, wants_assistant
from regard.recipes.relations import States, relation_loss, split, states_of
from regard.recipes.training import Progress, factor, trained
from regard.recipes.tuning import Tuning, tuned
from regard.tasks.task import IGNORED
from regard.testing.tiny import SHAPE, prompt, tiny_decoder, tiny_encoder

IDS = prompt(14, batch=2)
BATCH = {"input_ids": IDS}


def llama(seed: int = 1, **more: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **more})).double().eval()


def padded() -> dict[str, Tensor]:
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    return {"input_ids": IDS, "attention_mask": mask}


def states(seed: int, heads: int = 4, width: int = 6) -> States:
    source = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, h, 7, width, dtype=torch.float64, generator=source) for h in (heads, 2, 2)
    )
    real = torch.ones(2, 7, dtype=torch.bool)
    return States(q, k, v, torch.ones(1, 1, 7, 7, dtype=torch.bool).tril(), real)


# Relations


@pytest.mark.parametrize("name", ["qk", "qq", "kk", "vv"])
def test_equal_relations_are_no_distance_apart(name: Any) -> None:
    one, other = states(0), states(1)
    loss = relation_loss(one.relation(name), one.relation(name), one.real)
    assert loss == 0
    assert relation_loss(one.relation(name), other.relation(name), one.real) > 0


@pytest.mark.parametrize("heads", [None, 3, 12])
def test_relations_are_distributions_over_what_is_seen(heads: int | None) -> None:
    one = states(0)
    for name in ("qk", "vv"):
        weights = one.relation(name, heads).exp()
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        assert bool((weights.triu(1) == 0).all())


def test_values_may_be_rotated() -> None:
    one = states(0)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    other = States(one.q, one.k, one.v @ turn, one.visible, one.real)
    torch.testing.assert_close(one.relation("vv"), other.relation("vv"))


def test_gradients_reach_what_a_relation_is_made_of() -> None:
    student, teacher = states(0), states(1)
    parts = {name: getattr(student, name).requires_grad_() for name in "qkv"}
    for name, reached in (("qk", {"q", "k"}), ("vv", {"v"})):
        loss = relation_loss(teacher.relation(name), student.relation(name), student.real)
        found = torch.autograd.grad(loss, list(parts.values()), allow_unused=True)
        assert {n for n, g in zip(parts, found, strict=True) if g is not None} == reached


def test_heads_are_split_anew() -> None:
    x = torch.arange(24.0).view(1, 2, 3, 4)
    assert torch.equal(split(x, 2), x)
    assert split(x, 4).shape == (1, 4, 3, 2)
    assert torch.equal(split(split(x, 8), 2), x)
    with pytest.raises(ArgumentError, match="divisor of 8"):
        split(x, 3)


def test_captured_states_give_the_models_own_attention() -> None:
    model = tiny_decoder().float()  # eager attention hides padding in single precision alone
    model.set_attn_implementation("eager")
    wanted = model(**padded(), output_attentions=True).attentions[-1]
    found = states_of(model, padded(), -1)
    there = found.real[:, None].expand(-1, 4, -1)
    torch.testing.assert_close(
        found.relation("qk").exp()[there], wanted[there], atol=1e-6, rtol=1e-5
    )


def test_padding_teaches_nothing() -> None:
    teacher, student = tiny_decoder(), tiny_decoder(seed=3)
    lesson = Minilm(teacher, student)
    together = lesson(padded())
    alone = [lesson({"input_ids": IDS[:1, 4:]}), lesson({"input_ids": IDS[1:]})]
    for name in ("qk", "vv"):
        mean = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(together[name], mean, atol=1e-6, rtol=1e-5)


def test_an_identical_student_has_nothing_to_learn() -> None:
    teacher = tiny_decoder()
    lesson = Minilm(teacher, copy.deepcopy(teacher), relations=("qk", "qq", "kk", "vv"))
    losses = torch.stack(list(lesson(BATCH).values()))
    assert float(losses.sum().detach()) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("teacher", "student", "options"),
    [
        (tiny_decoder, lambda: llama(num_hidden_layers=2, num_key_value_heads=2), {}),
        (
            tiny_decoder,
            lambda: llama(hidden_size=24, num_attention_heads=3, head_dim=8),
            {"relations": ("qq", "kk", "vv"), "relation_heads": 4, "layer": 1},
        ),
        (tiny_encoder, lambda: tiny_encoder(seed=5), {}),
    ],
)
def test_a_student_learns(teacher: Any, student: Any, options: dict[str, Any]) -> None:
    seen: list[Progress] = []
    taught, own = teacher(), student()
    before = copy.deepcopy(taught.state_dict())
    given = {**options, "assistant": False}
    minilm(taught, own, repeat(padded()), 40, rate=5e-3, watch=seen.append, **given)
    first, last = (sum(seen[i].losses.values()) for i in (0, -1))
    assert last < first / 2
    assert all(torch.equal(x, before[name]) for name, x in taught.state_dict().items())
    assert all(p.requires_grad for p in taught.parameters())


def test_heads_that_do_not_match_are_refused() -> None:
    lesson = Minilm(tiny_decoder(), llama(num_attention_heads=2, head_dim=8))
    with pytest.raises(ArgumentError, match="relation_heads"):
        lesson(BATCH)
    with pytest.raises(ArgumentError, match="layer"):
        Minilm(tiny_decoder(), tiny_decoder(), layer=3)
    with pytest.raises(ArgumentError, match="relations"):
        Minilm(tiny_decoder(), tiny_decoder(), relations=())


def test_an_assistant_stands_between_where_the_student_is_small() -> None:
    teacher = llama(num_hidden_layers=4)
    small = llama(num_hidden_layers=2, hidden_size=16, head_dim=4)
    assert wants_assistant(teacher, small)
    assert not wants_assistant(teacher, llama(num_hidden_layers=2))
    between = assistant_of(teacher, small)
    assert (between.config.num_hidden_layers, between.config.hidden_size) == (4, 16)
    assert between.dtype == small.dtype
    seen: list[Progress] = []
    minilm(teacher, small, repeat(BATCH), 3, watch=seen.append)
    assert [one.done for one in seen] == [1, 2, 3, 1, 2, 3]


# Sharing maps


def test_blocks_of_layers_that_attend_alike() -> None:
    model = llama(num_hidden_layers=5)
    with torch.no_grad():
        for layer in model.model.layers:  # uniform maps are alike
            layer.self_attn.q_proj.weight.zero_()
    assert like_blocks(model, [BATCH], 0.9) == ((1, 2, 3),)
    with pytest.raises(ArgumentError, match="threshold"):
        like_blocks(tiny_decoder(), [BATCH], 0.99)


def test_followers_are_counted() -> None:
    model = tiny_decoder()
    assert spared(model, ((0, 1, 2),)) == 2 * (32 * 32 + 16 * 32)
    assert len(followers(model, ((0, 1),))) == 2


def test_a_student_learns_to_share() -> None:
    teacher, seen = tiny_decoder(), []
    found = echo_att(
        teacher, ((0, 1),), repeat(BATCH), 30, adjusting=5, rate=3e-3, watch=seen.append
    )
    assert set(seen[0].losses) == {"states", "soft", "hard"}
    assert set(seen[-1].losses) == {"hard"}
    assert sum(seen[29].losses.values()) < 0.7 * sum(seen[0].losses.values())
    for module in followers(found.model, found.blocks):
        assert any(torch.equal(module.weight, m.weight) for m in followers(teacher, ((0, 1),)))
    assert all(p.requires_grad for p in found.model.parameters())
    with pytest.raises(ArgumentError):
        Weights(soft=-1.0)


def test_a_student_that_shares_nothing_new_has_nothing_to_learn() -> None:
    teacher = tiny_decoder()
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        for layer in teacher.model.layers:
            getattr(layer.self_attn, part).weight.data.zero_()
    seen: list[Progress] = []
    echo_att(teacher, ((0, 1),), repeat(BATCH), 1, weights=Weights(hard=0), watch=seen.append)
    assert sum(seen[0].losses.values()) == pytest.approx(0.0, abs=1e-10)


# Losses and the loop


def test_targets_are_the_next_real_tokens() -> None:
    found = targets_of(padded())
    assert found[0].tolist() == [*[IGNORED] * 4, *IDS[0, 5:].tolist(), IGNORED]
    assert found[1].tolist() == [*IDS[1, 1:].tolist(), IGNORED]
    with pytest.raises(ArgumentError, match="some token"):
        targets_of({"input_ids": IDS, "targets": torch.full_like(IDS, IGNORED)})


def test_losses_are_their_formulas() -> None:
    model = tiny_decoder()
    with torch.no_grad():
        output = model(**BATCH, labels=IDS)
        torch.testing.assert_close(hard_loss(output.logits, BATCH).float(), output.loss)
        other = tiny_decoder(seed=2)(**BATCH).logits
    real = torch.ones_like(IDS, dtype=torch.bool)
    assert soft_loss(other, other, real, 2.0) == 0
    p, q = ((x / 2).softmax(-1) for x in (output.logits, other))
    wanted = 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(soft_loss(other, output.logits, real, 2.0), wanted)


def test_tuning_learns_all_weights_or_thin_matrices() -> None:
    for rank in (None, 2):
        model, seen = tiny_decoder(), []
        before = {name: x.clone() for name, x in model.state_dict().items()}
        tuned(model, repeat(BATCH), 25, rank=rank, rate=1e-2, watch=seen.append)
        assert seen[-1].losses["hard"] < 0.7 * seen[0].losses["hard"]
        changed = {
            name for name, x in model.state_dict().items() if not torch.equal(x, before[name])
        }
        assert set(before) == set(model.state_dict())
        assert ("model.embed_tokens.weight" in changed) == (rank is None)
        assert all(p.requires_grad for p in model.parameters())
        if rank is not None:
            change = (
                model.model.layers[0].mlp.up_proj.weight
                - before["model.layers.0.mlp.up_proj.weight"]
            )
            assert int(torch.linalg.matrix_rank(change, rtol=1e-6)) == rank


def test_low_rank_is_taken_off_after_an_error() -> None:
    model = tiny_decoder()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(KeyError), low_rank(model, 2):
        raise KeyError
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    with pytest.raises(ArgumentError, match="rank"), low_rank(model, 0):
        pass


def test_the_rate_rises_and_falls() -> None:
    factors = [factor(done, 20) for done in range(20)]
    assert factors[0] == 0.5
    assert max(factors) == factors[1] == factors[2] == 1.0
    assert 0 < factors[-1] < 0.1
    assert factor(0, 1) == 1.0


def test_a_loop_that_cannot_be() -> None:
    model = tiny_decoder()
    with pytest.raises(ArgumentError, match="batches"):
        tuned(model, [BATCH], 2)
    for steps, rate in ((0, 1e-3), (1, 0.0), (1, math.inf)):
        with pytest.raises(ArgumentError, match="steps, rate"):
            trained(Tuning(model), [BATCH], steps, rate=rate)


def test_without_accelerate_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UnsupportedError, match=r"regard\[train\]"):
        tuned(tiny_decoder(), [BATCH], 1)
