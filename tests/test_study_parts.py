"""Known answers of what the studies are made of: generators, readings, measures."""

from __future__ import annotations

import math

import numpy as np
import torch

from regard.operators.similarity import row_shares
from regard.studies.backcopy_chain import Chain
from regard.studies.decoder import Decoder, Steps, train
from regard.studies.multiplication import EQUALS, TIMES, Told, digits, drawn, running_sums


def test_running_sums_give_the_digits_of_every_product() -> None:
    for a in torch.arange(100, 1000).split(100):
        left, right = (
            x.flatten() for x in torch.meshgrid(a, torch.arange(100, 1000), indexing="ij")
        )
        found = running_sums(digits(left, 3), digits(right, 3))
        assert torch.equal(found % 10, digits(left * right, 6))


def test_the_largest_running_sums_of_four_digits() -> None:
    most = digits(torch.tensor([9999]), 4)
    assert running_sums(most, most).tolist() == [[81, 170, 260, 350, 278, 189, 99, 9]]


def test_products_are_spelled_out_but_for_their_last_digit() -> None:
    batch = drawn(64, 3, torch.Generator().manual_seed(0))
    places = 10 ** torch.arange(3)
    a, b = (batch.tokens[:, part] @ places for part in (slice(0, 3), slice(4, 7)))
    assert ((a >= 100) & (b >= 100)).all()
    assert (batch.tokens[:, 3] == TIMES).all()
    assert (batch.tokens[:, 7] == EQUALS).all()
    assert torch.equal(batch.tokens[:, 8:], digits(a * b, 6)[:, :-1])


def test_running_sums_are_read_from_the_first_heads_of_the_second_layer() -> None:
    torch.manual_seed(0)
    model = Told(3, 16, 4)
    tokens = drawn(2, 3, torch.Generator().manual_seed(0)).tokens
    with torch.no_grad():
        _, before = model(tokens)
        second = model.decoder.blocks[1].mixer
        second.v_proj.weight[8:] += 1  # heads 2 and 3
        assert torch.equal(model(tokens)[1], before)
        second.v_proj.weight[4:8] += 1  # head 1
        assert torch.equal(model(tokens)[1][:, 0], before[:, 0])
        assert not torch.allclose(model(tokens)[1][:, 1], before[:, 1])


def test_triggers_are_the_tokens_a_walk_meets_most() -> None:
    chain = Chain.drawn(12, 3, seed=1)
    np.testing.assert_allclose(chain.visits @ chain.transition, chain.visits, atol=1e-9)
    assert set(np.flatnonzero(chain.triggers)) == set(np.argsort(chain.visits)[-3:])


def test_the_chain_copies_after_triggers_and_follows_its_matrix_elsewhere() -> None:
    matrix = np.random.default_rng(0).dirichlet(np.ones(6), 6)
    triggers = np.array([False, True, False, False, True, False, False])
    chain = Chain(matrix, np.arange(1.0, 7.0) / 21, triggers)
    x = chain.sequences(np.random.default_rng(0), 20000, 12).numpy()
    trigger = triggers[x]
    assert (x[:, 0] == 6).all()
    assert not (trigger[:, 1:] & trigger[:, :-1]).any()
    first = np.bincount(x[:, 1], minlength=6) / 20000
    np.testing.assert_allclose(first, np.array([1, 0, 3, 4, 0, 6]) / 14, atol=0.02)
    after = trigger[:, 1:-1]
    assert (x[:, 2:][after] == x[:, :-2][after]).all()
    counts = np.zeros((6, 6))
    np.add.at(counts, (x[:, 1:-1][~after], x[:, 2:][~after]), 1)
    free = counts.sum(1) > 0
    assert set(np.flatnonzero(~free)) == {1, 4}
    shares = counts[free] / counts[free].sum(1, keepdims=True)
    np.testing.assert_allclose(shares, matrix[free], atol=0.02)


def test_a_look_is_what_the_decoder_does() -> None:
    torch.manual_seed(0)
    model = Decoder(7, 9, 8, layers=2, heads=2)
    tokens = torch.randint(7, (3, 9))
    notes: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        logits = model(tokens, notes)
        looks = model.looks(tokens)
        torch.testing.assert_close(model.output(model.norm(looks[-1].residual)), logits)
    for look, heads in zip(looks, notes["heads"], strict=True):
        torch.testing.assert_close(look.weights.sum(-1), torch.ones(3, 2, 9))
        assert not look.weights.triu(1).any()
        torch.testing.assert_close(look.weights @ look.values, heads)


def test_training_counts_its_steps() -> None:
    told: list[float] = []
    model = torch.nn.Linear(1, 1)
    count = Steps(6, told.append)
    losses = []

    def loss() -> torch.Tensor:
        losses.append(model(torch.ones(1)).square().sum())
        return losses[-1]

    for _ in range(2):
        assert list(train(model, loss, 3, 0.1, count)) == [1, 2, 3]
    assert told == [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0]
    assert losses[-1] < losses[0]


def test_row_shares_are_of_magnitudes() -> None:
    shares = row_shares(torch.tensor([[1.0, -3.0, 0.0], [0.0, 0.0, 0.0]]))
    assert shares[0].tolist() == [0.25, 0.75, 0.0]
    assert not shares[1].any()
    assert math.isfinite(shares.sum().item())
