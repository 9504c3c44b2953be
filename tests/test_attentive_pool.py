"""Pools that attend, and what frozen tokens tell through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regard.core.errors import ArgumentError
from regard.features.abmilp import AbMilp
from regard.features.aim_pool import AimPool
from regard.features.cae_pool import CaePool
from regard.features.coca_pool import CocaPool
from regard.features.efficient_probing import EfficientProbing
from regard.features.pooling import MeanPool
from regard.features.simpool import SimPool
from regard.lenses.attentive_probe import Labelled, probe_features
from regard.studies.masked_digits import PLACES, SIZES, Filling, Pretraining, patches
from regard.tasks.digits import Digits
from regard.testing.compare import close

DIM = 12
POOLS: dict[str, Callable[[], nn.Module]] = {
    "mean": MeanPool,
    "ep": lambda: EfficientProbing(DIM, queries=3, shrink=2, bias=True),
    "aim": lambda: AimPool(DIM, heads=3, queries=2),
    "simpool": lambda: SimPool(DIM, heads=2, bias=True),
    "simpool_gamma": lambda: SimPool(DIM, heads=2, gamma=1.25, shift=True),
    "simpool_plain": lambda: SimPool(DIM, heads=2, linear=False, gamma=2.0),
    "cae": lambda: CaePool(DIM, heads=2, head_dim=5, bias=True),
    "coca": lambda: CocaPool(DIM, heads=2, head_dim=4, width=8, norm=True, feed_forward=6),
    "abmilp": lambda: AbMilp(DIM, depth=3, activation="relu"),
    "abmilp_map": lambda: AbMilp(DIM, exchange="map"),
    "abmilp_both": lambda: AbMilp(DIM, exchange="both"),
}


@pytest.fixture(params=POOLS)
def pool(request: Any) -> nn.Module:
    torch.manual_seed(0)
    built = POOLS[request.param]().double().eval()
    with torch.no_grad():
        for weight in built.parameters():
            weight.add_(0.5 * torch.randn_like(weight))
    return built


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(1)).double()


def test_order_never_matters(pool: nn.Module) -> None:
    x = tokens(2, 7)
    close(pool(x.flip(1)), pool(x), "reversed", 1e-12)


def test_padding_and_neighbours_never_matter(pool: nn.Module) -> None:
    x = tokens(3, 7)
    real = torch.ones(3, 7, dtype=torch.bool)
    real[0, :3], real[1, 5:], real[2, ::2] = False, False, False
    alone = [pool(row[keep][None]) for row, keep in zip(x, real, strict=True)]
    for junk in (torch.nan, -1e3):
        filled = x.masked_fill(~real[..., None], junk).requires_grad_()
        y = pool(filled, real)
        close(y, torch.cat(alone), f"padded with {junk}", 1e-12)
        pool.zero_grad()
        y.sum().backward()
        assert filled.grad is not None
        assert not filled.grad[~real].any()
        for name, weight in pool.named_parameters():
            assert weight.grad is not None, name
            assert weight.grad.isfinite().all(), name


def test_nothing_real_gives_finite_numbers(pool: nn.Module) -> None:
    x = tokens(2, 4).requires_grad_()
    real = torch.tensor([[True] * 4, [False] * 4])
    y = pool(x, real)
    assert y.isfinite().all()
    y.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    for weight in pool.parameters():
        assert weight.grad is None or weight.grad.isfinite().all()


def test_no_tokens_and_no_rows(pool: nn.Module) -> None:
    assert pool(tokens(2, 0)).isfinite().all()
    width = pool(tokens(1, 3)).shape[1]
    assert pool(tokens(0, 3)).shape == (0, width)
    assert pool(tokens(1, 3)[:0, :0]).shape == (0, width)


def test_gradients_are_right(pool: nn.Module) -> None:
    x = tokens(2, 3)[..., :].requires_grad_()
    assert torch.autograd.gradcheck(pool, (x,))


def test_bad_shapes_are_refused(pool: nn.Module) -> None:
    with pytest.raises(ArgumentError, match="padding"):
        pool(tokens(2, 5), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="x"):
        pool(tokens(2))
    if not isinstance(pool, MeanPool):
        with pytest.raises(ArgumentError, match="x"):
            pool(tokens(2, 5)[..., 1:])


def test_one_query_pools_then_projects() -> None:
    own, x = EfficientProbing(DIM, queries=1).double(), tokens(2, 5)
    weights = (x @ own.queries[0] / DIM**0.5).softmax(1)
    close(own(x), own.value((weights[..., None] * x).sum(1)), "one query", 1e-12)


def test_zero_queries_pool_the_mean() -> None:
    own, x = EfficientProbing(DIM, queries=4, shrink=3).double(), tokens(2, 5)
    close(own(x, queries=torch.zeros(1, 4, DIM).double()), own.value(x.mean(1)), "mean", 1e-12)


def test_a_query_reads_its_own_slice() -> None:
    own, x = EfficientProbing(DIM, queries=3).double(), tokens(2, 5)
    before, other = own(x), own.queries.detach().clone()[None]
    other[0, 1] += 1.0
    changed = (own(x, queries=other) != before).any(0)
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 4


@pytest.mark.parametrize("build", [EfficientProbing, AimPool])
def test_queries_may_differ_by_row(build: Any) -> None:
    own, x = (
        build(DIM, queries=2, **({"heads": 3} if build is AimPool else {})).double(),
        tokens(2, 5),
    )
    given = torch.randn(2, 2, DIM).double()
    together = own.eval()(x, queries=given)
    for row in range(2):
        close(own(x[row, None], queries=given[row, None]), together[row, None], "alone", 1e-12)
    with pytest.raises(ArgumentError, match="queries"):
        own(x, queries=given[:, :1])


def test_aim_counts_real_tokens_alone() -> None:
    x = tokens(3, 6)
    real = torch.ones(3, 6, dtype=torch.bool)
    real[1, 4:] = False
    own = AimPool(DIM, heads=3).double().train()
    own(x.masked_fill(~real[..., None], torch.nan), real)
    assert own.norm.running_mean is not None
    close(own.norm.running_mean, 0.1 * x[real].mean(0), "running mean", 1e-12)
    dense = AimPool(DIM, heads=3).double().train()
    dense.load_state_dict(own.state_dict())
    full = torch.ones_like(real)
    close(dense(x, full), dense(x), "nothing padded", 1e-12)


def test_aim_averages_its_queries() -> None:
    own, x = AimPool(DIM, heads=3, queries=2).double().eval(), tokens(2, 5)
    single = AimPool(DIM, heads=3).double().eval()
    single.load_state_dict({**own.state_dict(), "queries": own.queries[:1]})
    each = [single(x, queries=q[None, None]) for q in own.queries]
    close(own(x), torch.stack(each).mean(0), "mean of queries", 1e-12)


def test_simpool_with_exponent_one_is_plain() -> None:
    x = tokens(2, 5)
    plain, general = SimPool(DIM).double(), SimPool(DIM, gamma=1.0).double()
    general.load_state_dict(plain.state_dict())
    least = plain.norm(x).amin((1, 2))[:, None]
    close(general(x), plain(x) - least + 1e-6, "gamma 1", 1e-12)


def test_least_of_the_batch_knows_neighbours() -> None:
    x = tokens(2, 5)
    own = SimPool(DIM, gamma=3.0, least="batch", linear=False).double()
    assert not torch.allclose(own(x)[:1], own(x[:1])) or not torch.allclose(own(x)[1:], own(x[1:]))
    with pytest.raises(ArgumentError, match="least"):
        SimPool(DIM, least="all")  # type: ignore[arg-type]


def test_simpool_asks_with_the_mean_unless_told() -> None:
    own, x = SimPool(DIM).double(), tokens(2, 5)
    close(own(x, queries=x.mean(1, keepdim=True)), own(x), "mean", 1e-12)
    assert (own(x, queries=x[:, :1]) != own(x)).any()


def test_places_reach_keys_alone() -> None:
    x, places = tokens(2, 5), torch.randn(5, DIM).double()
    own = CaePool(DIM, heads=2).double()
    nn.init.normal_(own.query)
    one = x[:, :1]
    assert (own(x, places=places) != own(x)).any()
    close(own(one, places=places[:1]), own(one), "one token", 1e-12)
    moved = own(x, query_place=torch.randn(1, 1, DIM).double())
    assert (moved != own(x)).any()


def test_coca_shares_keys_and_values() -> None:
    own, x = CocaPool(DIM, heads=3, head_dim=4).double(), tokens(2, 5)
    k, v = own.kv(x).chunk(2, -1)
    q = own.q(own.norm_q(own.query)).view(3, 4)
    read = (torch.einsum("hd,bnd->bhn", q, k) / 2).softmax(-1) @ v
    close(own(x), own.out(read.flatten(1)), "by hand", 1e-12)


def test_abmilp_by_hand() -> None:
    own, x = AbMilp(DIM, depth=1).double(), tokens(2, 5)
    weights = own.score(x).softmax(1)
    close(own(x), (weights * x).sum(1), "depth 1", 1e-12)
    mapped, both = AbMilp(DIM, exchange="map").double(), AbMilp(DIM, exchange="both").double()
    both.load_state_dict(mapped.state_dict())
    one = x[:, :1]
    close(mapped(one), one[:, 0], "map pools tokens as they are", 1e-12)
    assert both.qkv is not None
    assert both.out is not None
    value = both.qkv(one)[..., -DIM:]
    close(both(one), both.out(value)[:, 0], "both pools what was exchanged", 1e-12)
    assert (mapped(x, places=10 * tokens(5)) != mapped(x)).any()


@pytest.mark.parametrize(
    "build",
    [
        lambda: EfficientProbing(DIM, queries=5),
        lambda: EfficientProbing(DIM, queries=4, shrink=4),
        lambda: AimPool(DIM, heads=5),
        lambda: SimPool(DIM, shift=True),
        lambda: SimPool(DIM, gamma=-1.0),
        lambda: CaePool(DIM, heads=5),
        lambda: CocaPool(DIM, heads=0),
        lambda: AbMilp(DIM, depth=0),
        lambda: AbMilp(DIM, exchange="all"),  # type: ignore[arg-type]
    ],
)
def test_impossible_options_are_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(ArgumentError):
        build()


def digit_patches(split: Any, padded: bool = False) -> Labelled:
    """Digits as 16 patches that know their place; padded: four patches of nothing in front."""
    batch = next(Digits().batches(split, SIZES[split]))
    x = patches(batch.inputs)
    x = torch.cat([x, torch.eye(PLACES).expand(len(x), -1, -1)], -1)
    if not padded:
        return Labelled(x, batch.targets)
    junk = torch.full((len(x), 4, x.shape[2]), torch.nan)
    real = torch.cat([torch.zeros(len(x), 4), torch.ones(len(x), PLACES)], 1).bool()
    return Labelled(torch.cat([junk, x], 1), batch.targets, real)


def seeded_ep(width: int) -> EfficientProbing:
    torch.manual_seed(0)
    return EfficientProbing(width, queries=10)


def test_digits_are_read_by_attending() -> None:
    train, test = digit_patches("train"), digit_patches("test")
    attended = probe_features(train, test, seeded_ep(20), epochs=20)
    averaged = probe_features(train, test, MeanPool(), epochs=20)
    assert attended.accuracy > 0.85
    assert averaged.accuracy < attended.accuracy - 0.2, "the mean of patches forgets their places"
    assert attended.losses[-1] < attended.losses[0] / 2
    assert not attended.head.training


def test_padding_leaves_probing_as_it_is() -> None:
    told: list[float] = []
    plain = probe_features(digit_patches("train"), digit_patches("test"), seeded_ep(20), epochs=2)
    padded = probe_features(
        digit_patches("train", True),
        digit_patches("test", True),
        seeded_ep(20),
        epochs=2,
        progress=told.append,
    )
    assert padded.losses == pytest.approx(plain.losses, rel=1e-4)
    assert padded.accuracy == pytest.approx(plain.accuracy, abs=0.01)
    assert told == [0.5, 1.0]


def test_shuffled_labels_are_not_read() -> None:
    train, test = digit_patches("train"), digit_patches("test")
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))
    shuffled = Labelled(train.tokens, train.labels[order])
    assert probe_features(shuffled, test, seeded_ep(20), epochs=3).accuracy < 0.3


def test_probing_is_repeatable_and_leaves_the_generator_alone() -> None:
    train, test = digit_patches("valid"), digit_patches("test")
    first = probe_features(train, test, seeded_ep(20), epochs=1)
    pool = seeded_ep(20)
    state = torch.get_rng_state()
    again = probe_features(train, test, pool, epochs=1)
    assert torch.equal(state, torch.get_rng_state())
    assert (first.losses, first.accuracy) == (again.losses, again.accuracy)
    assert first.losses != probe_features(train, test, seeded_ep(20), epochs=1, seed=1).losses


class NoPool(nn.Module):
    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return x


def test_bad_samples_are_refused() -> None:
    x, y = tokens(4, 3), torch.tensor([0, 1, 0, 1])
    good = Labelled(x, y)
    for bad in (
        lambda: Labelled(x[:0], y[:0]),
        lambda: Labelled(x, y[:3]),
        lambda: Labelled(x, y.float()),
        lambda: Labelled(x, y, torch.ones(4, 2, dtype=torch.bool)),
        lambda: probe_features(good.rows(slice(0, 1)), good, MeanPool()),
        lambda: probe_features(good, Labelled(x[..., 1:], y), MeanPool()),
        lambda: probe_features(good, good, NoPool()),
        lambda: probe_features(good, good, MeanPool(), epochs=0),
    ):
        with pytest.raises(ArgumentError):
            bad()


def test_patches_are_squares_of_pixels() -> None:
    image = torch.arange(64.0).view(1, 64, 1)
    found = patches(image) * 0.37 + 0.3
    close(found[0, 0], torch.tensor([0.0, 1.0, 8.0, 9.0]), "first", 1e-5)
    close(found[0, 5], torch.tensor([18.0, 19.0, 26.0, 27.0]), "second row, second column", 1e-5)


def test_masked_patches_are_unseen() -> None:
    torch.manual_seed(0)
    model, x = Filling(8, 1, 2), torch.randn(2, PLACES, 4)
    gone = torch.zeros(2, PLACES, dtype=torch.bool)
    gone[:, 3] = True
    other = x.clone()
    other[:, 3] += 1.0
    assert torch.equal(model.tokens(x, gone), model.tokens(other, gone))
    assert (model.tokens(x) != model.tokens(other)).any()
    assert model.loss(x, gone) != model.loss(other, gone)


def test_pretraining_fills_in() -> None:
    x = patches(next(Digits().batches("test", 256)).inputs)
    gone = torch.zeros(x.shape[:2], dtype=torch.bool)
    gone[:, ::2] = True
    before, after = (
        Pretraining(dim=16, layers=1, steps=s).run(0, lambda _: None) for s in (1, 150)
    )
    with torch.no_grad():
        assert after.loss(x, gone) < 0.8 * before.loss(x, gone)
