"""Approximate and sparse attention: what each promises beyond the contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.mask import Causal
from regard.importance.angular_hash import angular_hash
from regard.importance.drawn import drawn, drawn_normal
from regard.importance.pyramid import FACTORS, pooling_factors, similarity_cap
from regard.operators.hashed_blocks import Rule, approximate
from regard.operators.hyper_attention import hyper_attention
from regard.operators.pyramid_sparse import on_pyramid
from regard.operators.softmax import softmax
from regard.testing.compare import close

CPU = torch.device("cpu")


def qkv(n: int, heads: int = 2, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 1, heads, n, width, dtype=torch.float64)
    return q, k, v


def test_a_pyramid_of_equal_keys_is_exact() -> None:
    """Keys and values that do not differ inside groups of 8: any levels give softmax attention."""
    q, k, v = qkv(64)
    k, v = (x[:, :, ::8].repeat_interleave(8, 2) for x in (k, v))
    factors = torch.tensor(FACTORS)[torch.randint(4, (1, 2, 4, 4))]
    real = torch.ones(1, 64, dtype=torch.bool)
    places = Call(query_positions=torch.arange(64))
    close(
        on_pyramid(q, k, v, places, factors, real, 16).output,
        softmax(q, k, v, Call()).output,
        "pyramid",
    )


def test_skipped_blocks_are_hidden_keys() -> None:
    q, k, v = qkv(32)
    factors = torch.tensor([[1, 0], [0, 1]])[None, None]
    real = torch.ones(1, 32, dtype=torch.bool)
    places = Call(query_positions=torch.arange(32))
    got = on_pyramid(q, k, v, places, factors, real, 16).output
    for part in (slice(0, 16), slice(16, 32)):
        alone = softmax(q[:, :, part], k[:, :, part], v[:, :, part], Call()).output
        close(got[:, :, part], alone, "block")


def test_levels_fall_with_importance() -> None:
    importance = torch.rand(2, 3, 10, 10)
    every = torch.ones(1, dtype=torch.bool)
    factors = pooling_factors(importance, every, (0.3, 0.5, 0.7, 0.9))
    order = importance.argsort(-1, descending=True)
    coarse = torch.where(factors == 0, 99, factors).gather(-1, order)
    assert (coarse.diff(dim=-1) >= 0).all()
    assert (coarse[..., 0] == 1).all()
    printed = pooling_factors(
        torch.tensor([[0.97, 0.02, 0.01]]), every, (0.3, 0.5, 0.7, 0.9), inclusive=False
    )
    assert not printed.any(), "the printed rule skips a block above every threshold"


def test_alike_keys_may_be_read_coarsely() -> None:
    k = torch.randn(1, 1, 16, 8)
    k[:, :, :8] = k[:, :, :1]
    real = torch.ones(1, 16, dtype=torch.bool)
    assert similarity_cap(k, real, 8, (0.9, 0.9, 0.9)).tolist() == [[[8, 1]]]


def test_neighbouring_buckets_differ_in_one_bit() -> None:
    order = angular_hash(4, 5, 0, CPU).order
    patterns = order.argsort()
    differing = patterns[1:] ^ patterns[:-1]
    assert sorted(order.tolist()) == list(range(32))
    assert ((differing & (differing - 1)) == 0).all()


def test_drawn_numbers() -> None:
    numbers = drawn(3, 100_000, CPU)
    assert numbers.min() > 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 5e-3
    counts = torch.histc(numbers, 64)
    assert ((counts - 100_000 / 64) ** 2 / (100_000 / 64)).sum() < 120  # chi-squared, 63 degrees
    neighbours = torch.stack([numbers[:-1], numbers[1:]]) - 0.5
    assert abs((neighbours[0] * neighbours[1]).mean()) < 2e-3
    normal = drawn_normal(4, 100_000, CPU)
    assert abs(normal.mean()) < 2e-2
    assert abs(normal.var() - 1) < 2e-2
    assert not torch.equal(drawn(3, 10, CPU), drawn(4, 10, CPU))


def sampled(q: Tensor, k: Tensor, v: Tensor, seed: int, samples: int) -> Tensor:
    options = {"block": 8, "samples": samples, "exact_below": 2, "projections": 3}
    return hyper_attention(q, k, v, Call(), seed=seed, **options).output  # type: ignore[arg-type]


def test_more_samples_err_less() -> None:
    """The mean squared error falls as the number of samples."""
    q, k, v = (0.3 * x for x in qkv(128))
    exact = softmax(q, k, v, Call()).output
    few, many = (
        torch.stack([(sampled(q, k, v, s, m) - exact).square().mean() for s in range(12)]).mean()
        for m in (16, 256)
    )
    assert 8 < few / many < 32


def test_row_sums_are_unbiased() -> None:
    q, k, v = (0.5 * x for x in qkv(64, heads=1))
    source = torch.Generator().manual_seed(5)

    def draw(branch: int, heads: int, keys: int) -> Tensor:
        return torch.randint(keys, (1, heads, 4096), generator=source)

    rule = Rule(angular_hash(8, 3, 0, CPU), draw, 8, 4096, 2, True, 8**-0.5)
    lse = torch.stack([approximate(q, k, v, rule).row_lse.exp() for _ in range(8)]).mean(0)
    exact = torch.logsumexp(q @ k.mT * 8**-0.5, -1).exp()
    assert ((lse - exact).abs() / exact).max() < 0.03


@pytest.mark.parametrize("n", [37, 64])
def test_short_halves_are_exact(n: int) -> None:
    """Rows of the first half of a causal call see exact attention down to `exact_below`."""
    q, k, v = qkv(n)
    out = hyper_attention(q, k, v, Call(mask=Causal()), block=4, samples=2, exact_below=40).output
    exact = softmax(q, k, v, Call(mask=Causal())).output
    if n == 37:
        close(out, exact, "short")
        return
    close(out[:, :, : n // 2], exact[:, :, : n // 2], "first half")
    close(out, exact, "the second half reads few enough queries to be exact")
