"""Reordering of grids: orders, scores, blocks and rounding of PAROAttention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.errors import ArgumentError
from regard.features.block_quantised import quantised
from regard.features.grid_orders import grid_orders
from regard.importance.cell_maps import calibrate
from regard.importance.reordering import largest_blocks, order_scores, roughness, sparse_share
from regard.operators.paro import paro
from regard.operators.softmax import softmax
from regard.testing.compare import close

GRID = (4, 3, 4)


def qkv(cells: int, prefix: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, 3, prefix + cells, 8, dtype=torch.float64)
    return q, k, v


def test_orders() -> None:
    assert grid_orders((2, 3)).tolist() == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]]
    table = grid_orders(GRID)
    assert len(table) == 6
    assert all(sorted(row.tolist()) == list(range(48)) for row in table)


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize("prefix", [0, 3])
def test_no_order_changes_full_attention(order: int, prefix: int) -> None:
    q, k, v = qkv(48, prefix)
    call = Call(grid=GRID, prefix=prefix)
    got = paro(q, k, v, call, orders=order, density=1.0, block=4).output
    close(got, softmax(q, k, v, Call()).output, "order")
    every = torch.ones(1, 3, 12, 12, dtype=torch.bool)
    got = paro(q, k, v, call, orders=(order, 0, 5), kept=every, block=4).output
    close(got, softmax(q, k, v, Call()).output, "all blocks kept")


def along(axis: int) -> Tensor:
    """A map in which a cell attends to those that differ from it along one axis alone."""
    places = torch.stack(torch.meshgrid(*map(torch.arange, GRID), indexing="ij"), -1).flatten(0, 2)
    others = [i for i in range(3) if i != axis]
    same = (places[:, None, others] == places[None, :, others]).all(-1)
    return same.double() / same.sum(-1, keepdim=True)


def test_the_axis_of_a_pattern_goes_innermost() -> None:
    table = grid_orders(GRID)
    for axis, orders in ((2, {0, 2}), (0, {3, 5})):
        maps = along(axis)
        shares = torch.stack([sparse_share(maps[o[:, None], o], 4) for o in table])
        assert set(shares.eq(shares.max()).nonzero()[:, 0].tolist()) == orders
        scores = order_scores(lambda i, m=maps: m[table[i][:, None], table[i]], 6, 4)
        assert int(scores.argmin()) in orders


def test_roughness() -> None:
    assert roughness(torch.full((10, 10), 0.3), 4) == pytest.approx(1.0)
    peaked = torch.zeros(4, 4)
    peaked[0, 0] = 1.0
    assert roughness(peaked, 4) == pytest.approx(16.0)
    assert sparse_share(peaked, 4) == 1


def test_largest_blocks() -> None:
    maps = torch.rand(2, 12, 12)
    keep = largest_blocks(maps, 4, 4 / 9)
    sums = maps.unflatten(-1, (3, 4)).sum(-1).unflatten(-2, (3, 4)).sum(-2)
    for mine, total in zip(keep, sums, strict=True):
        assert mine.sum() == 4
        assert total[mine].min() > total[~mine].max()


def test_rounding() -> None:
    x = torch.randn(10, 6, dtype=torch.float64)
    for bits in (4, 8):
        rounded, most = quantised(x, bits, 4), 2 ** (bits - 1) - 1
        for start in (0, 4, 8):
            part, got = x[start : start + 4], rounded[start : start + 4]
            steps = got / (part.abs().max() / most)
            close(steps, steps.round(), "integers", 1e-9)
            assert (got - part).abs().max() <= part.abs().max() / most / 2 + 1e-12
    assert torch.equal(quantised(torch.zeros(3, 3), 8, 2), torch.zeros(3, 3))
    with pytest.raises(ArgumentError):
        quantised(x, 1, 4)


def test_fewer_bits_err_more() -> None:
    q, k, v = qkv(48, 2)
    exact = softmax(q, k, v, Call()).output
    call, errors = Call(grid=GRID, prefix=2), []
    for bits in (4, 8, 12):
        got = paro(q, k, v, call, orders=1, density=1.0, bits=(bits, bits), block=4).output
        errors.append((got - exact).abs().max().item())
    assert errors[0] > 4 * errors[1] > 16 * errors[2]
    assert errors[2] < 1e-2


def test_calibrated_once() -> None:
    """Orders and blocks of a batch serve other calls; heads differ."""
    q, k, v = qkv(48)
    orders, kept = calibrate(q, k, Call(grid=GRID), block=4, density=0.5)
    assert len(orders) == 3
    assert kept.shape == (1, 3, 12, 12)
    assert kept.any(-1).all()
    got = paro(q, k, v, Call(grid=GRID), orders=orders, kept=kept, block=4).output
    assert got.isfinite().all()
    for bad in (6, (0, 1), (0, 1, -1)):
        with pytest.raises(ArgumentError, match="orders"):
            paro(q, k, v, Call(grid=GRID), orders=bad, block=4)
