"""Dictionaries of what heads give: code, attribution, training, measures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard.core.errors import ArgumentError
from regard.lenses.dictionary import Dictionary, joined, parted
from regard.lenses.dictionary_course import Course
from regard.lenses.dictionary_measures import (
    changed_outputs,
    head_outputs,
    pinned,
    recovered,
    sparsity,
)
from regard.lenses.dictionary_redraw import redraw
from regard.lenses.dictionary_training import DictionaryTraining
from regard.lenses.gradient_attention import attention_of
from regard.tasks.needle import Needle
from regard.tasks.task import IGNORED
from regard.testing.tiny import prompt, tiny_decoder

SITE = "model.layers.1.self_attn"
DIRECTIONS = F.normalize(torch.randn(12, 16, generator=torch.Generator().manual_seed(9)), dim=-1)


def identity(heads: int, head_dim: int, *, signed: bool = False) -> Dictionary:
    """A dictionary whose features are the entries of x (if signed, also of -x)."""
    width = heads * head_dim
    found = Dictionary(heads, head_dim, 2 * width if signed else width).double()
    eye = torch.eye(width).double()
    rows = torch.cat([eye, -eye]) if signed else eye
    with torch.no_grad():
        found.decoder.copy_(rows)
        found.encoder.copy_(rows.mT)
    return found


def planted(step: int) -> Tensor:
    """Sparse sums of the planted directions."""
    source = torch.Generator().manual_seed(step)
    there = torch.rand(64, 12, generator=source) < 0.15
    return (there * (1 + torch.rand(64, 12, generator=source))) @ DIRECTIONS


def test_identity_reconstructs() -> None:
    x = torch.rand(5, 12).double()
    found = identity(3, 4)
    coded = found(x)
    torch.testing.assert_close(coded.reconstruction, x)
    torch.testing.assert_close(coded.features, x)
    loss = found.loss(x, coded, 0.5)
    assert loss.error < 1e-12
    torch.testing.assert_close(loss.total, 0.5 * x.sum(-1).mean())
    shift = torch.rand(12).double()
    with torch.no_grad():
        found.decoder_bias.copy_(shift)
    torch.testing.assert_close(found(x + shift).reconstruction, x + shift)
    signed = torch.randn(5, 12).double()
    torch.testing.assert_close(identity(3, 4, signed=True)(signed).reconstruction, signed)


def test_head_weights() -> None:
    found = Dictionary(3, 4, 20)
    weights = found.head_weights()
    torch.testing.assert_close(weights.sum(-1), torch.ones(20))
    alone = identity(3, 4).head_weights()
    assert torch.equal(alone, torch.eye(3).double().repeat_interleave(4, 0))
    with torch.no_grad():
        found.decoder[2] = 0.0
    assert torch.equal(found.head_weights()[2], torch.zeros(3))


def test_attribution_sums_to_what_the_encoder_reads() -> None:
    model, ids = tiny_decoder(), prompt(9, batch=2)
    x = head_outputs(model, SITE, lambda: model(ids))
    found = Dictionary(4, 8, 20, seed=1).double()
    (call,) = attention_of(model, lambda: model(ids), [SITE])
    for feature in (0, 13):
        read = x @ found.encoder[:, feature]
        by_source = found.by_source(call.weights, call.values, feature)
        assert by_source.shape == (2, 9, 9)
        torch.testing.assert_close(by_source.sum(-1), read)
        assert not by_source.triu(1).any()
        by_head = found.by_head(x, feature)
        torch.testing.assert_close(by_head.sum(-1), read)
        one = x.clone()
        one[..., 8:] = 0
        torch.testing.assert_close(by_head[..., 0], one @ found.encoder[:, feature])


def test_joined_and_parted() -> None:
    z = torch.randn(2, 3, 5, 4)
    assert torch.equal(joined(z)[:, :, 4:8], z[:, 1])
    assert torch.equal(parted(joined(z), 3), z)


def test_refuses() -> None:
    found = Dictionary(3, 4, 20)
    with pytest.raises(ArgumentError, match="feature"):
        found.by_head(torch.zeros(2, 12), 20)
    with pytest.raises(ArgumentError, match="heads"):
        found.by_source(torch.zeros(1, 2, 5, 5), torch.zeros(1, 2, 5, 4), 0)
    with pytest.raises(ArgumentError, match="sizes"):
        Dictionary(0, 4, 20)
    with pytest.raises(ArgumentError, match="warm_up"):
        Course(warm_up=0)
    model, ids = tiny_decoder(), prompt(5)
    with pytest.raises(ArgumentError, match="site"):
        head_outputs(model, "nowhere", lambda: model(ids))
    with pytest.raises(ArgumentError, match="width 32"):
        recovered(model, SITE, found, lambda: model(ids).logits.sum())
    with pytest.raises(ArgumentError, match="feature"), pinned(model, SITE, found, 20, 0.0):
        pass


def test_course() -> None:
    course = Course(rate=2.0, warm_up=10, low=0.1)
    assert course.rate_at(0) == pytest.approx(0.2)
    assert course.rate_at(5) == pytest.approx(1.1)
    assert course.rate_at(10) == course.rate_at(99) == pytest.approx(2.0)


def test_a_step_keeps_rows_at_norm_one() -> None:
    training = DictionaryTraining(Dictionary(2, 8, 16), planted)
    before = training.dictionary.decoder.detach().clone()
    training.advance()
    after, gradient = training.dictionary.decoder, training.dictionary.decoder.grad
    assert gradient is not None
    assert not torch.equal(after, before)
    torch.testing.assert_close(after.norm(dim=-1), torch.ones(16))
    torch.testing.assert_close((gradient * before).sum(-1), torch.zeros(16), rtol=0, atol=1e-6)


def test_training_finds_planted_directions() -> None:
    found = Dictionary(2, 8, 24)
    course = Course(rate=0.01, sparsity=0.3, warm_up=50, every=500, looked_at=10)
    losses: list[float] = []
    training = DictionaryTraining(found, planted, course)
    training.run(1500, progress=lambda step, loss: losses.append(loss))
    assert sum(losses[-50:]) < sum(losses[:50]) / 3
    nearest = (DIRECTIONS @ found.decoder.detach().mT).amax(-1)
    assert nearest.median() > 0.95


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    course = Course(rate=0.01, warm_up=8, every=10, dead=0.2, looked_at=3, redraws=2)
    whole = DictionaryTraining(Dictionary(2, 8, 24), planted, course)
    whole.run(34)
    file = tmp_path / "dictionary.safetensors"
    DictionaryTraining(Dictionary(2, 8, 24), planted, course).run(17, file, save_every=5)
    resumed = DictionaryTraining(Dictionary(2, 8, 24, seed=5), planted, course)
    resumed.run(34, file)
    assert resumed.warm == whole.warm > 0
    assert torch.equal(resumed.fired, whole.fired)
    for name, p in whole.dictionary.state_dict().items():
        assert torch.equal(resumed.dictionary.state_dict()[name], p), name
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
    for other, terms in ((Dictionary(2, 8, 25), course), (Dictionary(2, 8, 24), Course())):
        with pytest.raises(ArgumentError, match="file"):
            DictionaryTraining(other, planted, terms).run(40, file)


def test_redrawn_features_start_anew() -> None:
    course = Course(every=3, dead=1.0, looked_at=1, redraws=1)  # all count as dead
    training = DictionaryTraining(Dictionary(2, 8, 24), planted, course)
    training.run(3)
    found = training.dictionary
    assert training.warm == 3
    for parameter in (found.encoder, found.decoder, found.encoder_bias):
        assert not training.adam.state[parameter]["exp_avg_sq"].any()
    assert training.adam.state[found.decoder_bias]["exp_avg_sq"].any()
    training.run(6)
    assert training.warm == 3


def test_redrawing() -> None:
    found, inputs = Dictionary(2, 8, 16), planted(0)
    dead = torch.tensor([2, 7])
    kept = torch.tensor([i for i in range(16) if i not in (2, 7)])
    before = {name: p.clone() for name, p in found.state_dict().items()}
    assert torch.equal(redraw(found, dead, inputs, 0.2, torch.Generator().manual_seed(0)), dead)
    for name, axis in (("encoder", 1), ("decoder", 0), ("encoder_bias", 0)):
        old, new = (d[name].index_select(axis, kept) for d in (before, found.state_dict()))
        assert torch.equal(old, new)
    cosine = F.normalize(inputs, dim=-1) @ found.decoder[dead].detach().mT
    torch.testing.assert_close(cosine.amax(0), torch.ones(2))
    living = found.encoder[:, kept].norm(dim=0).mean()
    torch.testing.assert_close(found.encoder[:, 2].norm(), living * 0.2)
    perfect = identity(2, 8)
    none = redraw(perfect, dead, torch.ones(3, 16).double(), 0.2, torch.Generator())
    assert len(none) == 0


def test_sparsity() -> None:
    x = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]]).double()
    found = sparsity(identity(2, 2), x)
    assert found.l0 == 1.5
    assert found.dead == 0.5
    with pytest.raises(ArgumentError, match="x"):
        sparsity(identity(2, 2), x[:0])


def test_recovered_and_pinned() -> None:
    model, ids = tiny_decoder(), prompt(9, batch=2)

    def loss() -> Tensor:
        return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    exact = recovered(model, SITE, identity(4, 8, signed=True), loss)
    assert exact.share == pytest.approx(1.0)
    assert exact.plain != pytest.approx(exact.silenced)
    nothing = Dictionary(4, 8, 5).double()
    with torch.no_grad():
        nothing.encoder.zero_()
    assert recovered(model, SITE, nothing, loss).share == pytest.approx(0.0)
    flat = recovered(model, SITE, nothing, lambda: torch.zeros(()))
    assert flat.share == 0.0


def test_pinned() -> None:
    model, ids = tiny_decoder(), prompt(9, batch=2)
    plain = model(ids).logits
    entries = identity(4, 8, signed=True)

    def clamped(x: Tensor) -> Tensor:
        return torch.cat([x[..., :3], x[..., 3:4].clamp(max=0), x[..., 4:]], -1)

    with changed_outputs(model, SITE, clamped):
        expected = model(ids).logits
    with pinned(model, SITE, entries, 3, 0.0):
        torch.testing.assert_close(model(ids).logits, expected)
    assert not torch.equal(expected, plain)
    assert torch.equal(model(ids).logits, plain)
    silent = Dictionary(4, 8, 5).double()  # what it does not explain stays
    with torch.no_grad():
        silent.encoder.zero_()
    with pinned(model, SITE, silent, 2, 0.0):
        torch.testing.assert_close(model(ids).logits, plain)


@pytest.mark.slow
def test_a_dictionary_of_the_pocket_model() -> None:
    """A few features per token keep what a layer's heads are worth to needles."""
    model, _ = regard.pocket.language()
    task = Needle(length=256, examples=256)
    batch = next(iter(task.batches("train", 128)))
    x = head_outputs(model, SITE, lambda: model(batch.inputs)).flatten(0, 1)

    def drawn(step: int) -> Tensor:
        source = torch.Generator().manual_seed(step)
        return x[torch.randint(len(x), (512,), generator=source)]

    course = Course(sparsity=1.0, warm_up=100, every=300, looked_at=5)
    found = DictionaryTraining(Dictionary(4, 32, 512), drawn, course).run(800)
    measured = sparsity(found, x[:4096])
    assert measured.l0 < 40
    assert measured.dead < 0.1
    test = next(iter(task.batches("test", 32)))

    def loss() -> Tensor:
        logits = model(test.inputs).logits
        return F.cross_entropy(logits.flatten(0, 1), test.targets.flatten(), ignore_index=IGNORED)

    assert recovered(model, SITE, found, loss).share > 0.9
