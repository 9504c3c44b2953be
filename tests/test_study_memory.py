"""Known answers for the studies of what one attention layer can hold, learn and deduce."""

from __future__ import annotations

import math

import pytest
import torch

from regard.core.errors import ArgumentError
from regard.studies.associative_capacity import (
    AssociativeCapacity,
    capacities,
    cycled_delta,
    hebb,
    recalled,
    slope,
    sphere,
)
from regard.studies.out_of_context import (
    FACT,
    IMPLICATION,
    OneLayer,
    OutOfContext,
    Vocabulary,
    effective_rank,
)
from regard.studies.random_features import (
    RandomFeatures,
    Sample,
    attention_features,
    network_features,
    relative_error,
    ridge,
)
from regard.testing.compare import close


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_head_reads_the_sum_of_its_pairs() -> None:
    keys, values, cues = (torch.randn(2, 5, 4, dtype=torch.float64) for _ in range(3))
    expected = torch.zeros_like(cues)
    for j in range(5):
        expected += (cues @ keys[:, j, :, None]) * values[:, j, None]
    close(hebb(cues, keys, values), expected, "sum of pairs", 1e-12)


def test_orthonormal_keys_are_all_held() -> None:
    assert capacities(torch.eye(6, dtype=torch.float64)) == (6, 6)


def test_equal_keys_are_not() -> None:
    assert capacities(torch.ones(4, 1, dtype=torch.float64)) == (1, 1)


def test_capacities_of_keys_at_an_angle() -> None:
    """Three keys with products 0.6: 0.6 + 0.6 > 1, but 2 * 0.36 < 1."""
    gram = torch.full((3, 3), 0.6, dtype=torch.float64).fill_diagonal_(1.0)
    assert capacities(torch.linalg.cholesky(gram)) == (2, 3)


def test_beyond_its_capacity_some_values_turn_the_answer_around() -> None:
    keys = sphere(drawn(), 40, 16)
    held = capacities(keys)[0]
    assert 1 < held < 40
    for count, turned in ((held, False), (held + 1, True)):
        products = keys[:count] @ keys[:count].mT
        worst = products.abs().sum(1).argmax()
        values = -products[worst].sign()
        values[worst] = 1.0
        read = hebb(keys[None, worst, None], keys[None, :count], values[None, :, None])
        assert (read.item() < 0) == turned


def test_delta_rule_replaces_and_corrects() -> None:
    key = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    twice, values = key.repeat(2, 1), torch.tensor([[3.0], [5.0]], dtype=torch.float64)
    assert cycled_delta(twice, values, 1).tolist() == [[5.0], [5.0]]
    keys, values = sphere(drawn(), 6, 12), sphere(drawn(1), 6, 12)
    assert (cycled_delta(keys, values, 1) - values).abs().max() > 0.01
    close(cycled_delta(keys, values, 300), values, "repeated", 1e-6)
    assert not cycled_delta(keys, values, 0).any()


def test_recalled_and_slope() -> None:
    values = torch.eye(4, dtype=torch.float64)
    assert recalled(values, values) == 1
    assert recalled(values[[0, 1, 3, 2]], values) == 0.5
    assert slope([(0.0, 1.0), (1.0, 1.5), (2.0, 2.0)]) == pytest.approx(0.5)


def test_sequences_hold_one_name_then_its_relation() -> None:
    words = Vocabulary(4, 16)
    first = 2 + 2 * words.cities
    names = torch.arange(16).repeat(20)
    for relation in (FACT, IMPLICATION):
        tokens = words.sequences(names, relation, 7, drawn())
        is_name = (tokens >= first) & (tokens < first + words.names)
        assert (is_name.sum(1) == 1).all()
        assert torch.equal(tokens[is_name], names + first)
        assert ((tokens == relation).sum(1) == 1).all()
        assert not (tokens == 1 - relation).any()
        places = (tokens == relation).long().argmax(1)
        assert (places > is_name.long().argmax(1)).all()
        assert set(places.tolist()) == set(range(1, 6))
        assert (tokens[:, -1] == words.size - 1).all()
        assert not (tokens[:, :-1] == words.size - 1).any()


def test_an_implication_is_the_animal_of_the_city() -> None:
    words, names = Vocabulary(4, 16), torch.arange(16)
    cities, animals = (words.answer(names, relation) for relation in (FACT, IMPLICATION))
    assert torch.equal(animals, cities + words.cities)
    assert torch.equal(cities[:4], cities[12:])
    assert len(set(cities.tolist())) == 4


def test_factors_and_their_product_are_one_function() -> None:
    tokens = torch.randint(9, (5, 6), generator=drawn())
    apart, merged = OneLayer(9, 4).double(), OneLayer(9, None).double()
    with torch.no_grad():
        for weight in apart.parameters():
            weight.copy_(torch.randn(weight.shape, generator=drawn(len(weight))))
        merged.query.copy_(apart.query)
        merged.output.copy_(apart.circuit())
    logits = apart(tokens)
    close(logits, merged(tokens), "logits", 1e-12)
    weights = apart.query[:, tokens[0, -1]][tokens[0]]  # linear attention of the last token
    counted = torch.zeros(9, dtype=torch.float64).index_add_(0, tokens[0], weights.detach())
    close(logits[0], apart.circuit() @ counted, "by hand", 1e-12)


def test_effective_rank() -> None:
    assert effective_rank(torch.eye(10)) == 9
    assert effective_rank(torch.diag(torch.tensor([95.0, 3.0, 2.0]))) == 1
    assert effective_rank(torch.diag(torch.tensor([80.0, 15.0, 5.0]))) == 2


def test_attention_features_are_the_formula() -> None:
    query, keys, w = (torch.randn(*s, dtype=torch.float64) for s in ((3, 4), (3, 5, 4), (2, 4, 4)))
    found = attention_features(query, keys, w).unflatten(1, (2, 4))
    for b in range(3):
        for m in range(2):
            scores = torch.stack([query[b] @ w[m] @ key for key in keys[b]]).relu()
            close(found[b, m], (scores[:, None] * keys[b]).sum(0) / 5, "phi", 1e-12)


def test_only_attention_forgets_the_order_of_keys() -> None:
    query, keys = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    w, flat = torch.randn(2, 4, 4, dtype=torch.float64), torch.randn(8, 24, dtype=torch.float64)
    turned = keys.flip(1)
    close(attention_features(query, keys, w), attention_features(query, turned, w), "phi", 1e-12)
    assert (network_features(query, keys, flat) - network_features(query, turned, flat)).any()


def test_targets_by_hand() -> None:
    query, keys = (
        torch.tensor([[2.0, 0.0, 1.0]]),
        torch.tensor([[[1.0, 3.0, 1.0], [4.0, 5.0, 1.0]]]),
    )
    sample = Sample(query, keys, torch.tensor([0.0, 1.0]))
    assert sample.target(0).item() == 4
    assert sample.target(1).item() == (2 * 3 + 8 * 5) / 2
    assert sample.target(2).item() == (4 * 3 + 64 * 5) / 2


def test_a_target_in_the_span_is_found_exactly() -> None:
    features = torch.randn(80, 12, generator=drawn(), dtype=torch.float64)
    true = torch.randn(12, generator=drawn(1), dtype=torch.float64)
    close(ridge(features[:50], features[:50] @ true, 1e-13), true, "coefficients", 1e-8)
    assert relative_error(features, features @ true, 60) < 1e-8
    noise = torch.randn(80, generator=drawn(2), dtype=torch.float64)
    assert relative_error(features, noise, 60) > 0.5


def test_a_strong_ridge_shrinks() -> None:
    features = torch.eye(3, dtype=torch.float64)
    close(
        ridge(features, torch.ones(3).double(), 1.0), torch.full((3,), 0.5).double(), "half", 1e-12
    )


@pytest.mark.parametrize(
    "build",
    [
        lambda: AssociativeCapacity(dims=(8,)),
        lambda: AssociativeCapacity(dim=2),
        lambda: OutOfContext(known=1.0),
        lambda: OutOfContext(batch=2),
        lambda: RandomFeatures(samples=4),
        lambda: RandomFeatures(heads=0),
    ],
)
def test_impossible_sizes_are_refused(build: object) -> None:
    with pytest.raises(ArgumentError):
        build()  # type: ignore[operator]


def test_predicted_cosine() -> None:
    assert AssociativeCapacity(dim=64).predicted(65) == pytest.approx(math.sqrt(0.5))
