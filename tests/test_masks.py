"""Every mask of the algebra: one predicate in all uses, sound bounds, sound expiry, no future."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask

import regard.masks
from regard.core import mask as algebra
from regard.core.blocks import tiles_of
from regard.core.call import Call
from regard.core.errors import ArgumentError
from regard.core.frame import Frame
from regard.core.mask import Both, Causal, Either, Given, Mask, Outside, Real
from regard.core.scored import attend
from regard.core.weights import Scored
from regard.masks.ahead import Ahead
from regard.masks.blocks import Blocks
from regard.masks.document import Document
from regard.masks.elastic import Elastic
from regard.masks.future import hides_future
from regard.masks.neighborhood import Neighborhood
from regard.masks.power import PowerReach
from regard.masks.shards import Shards
from regard.masks.shifted_groups import ShiftedGroups
from regard.masks.sinks import Sinks
from regard.masks.window import Window
from regard.operators.neighborhood import gna

BATCH, HEADS = 2, 4
TRIES = settings(max_examples=60, deadline=None, database=None, derandomize=True)

small = st.integers(1, 5)


@st.composite
def shards(draw: Callable[..., Any]) -> Shards:
    relative = draw(st.booleans())
    return Shards(
        block=draw(small),
        local=draw(st.one_of(st.integers(0, 3), st.tuples(small, small))),
        stride=draw(small),
        pattern_heads=draw(st.sampled_from([None, 1, 2, 4])),
        dense_heads=draw(st.integers(0, 1)),
        step=draw(st.one_of(st.none(), st.integers(0, 2))),
        offset=draw(st.integers(0, 2)),
        relative=relative,
    )


@st.composite
def neighborhoods(draw: Callable[..., Any], dims: int = 1) -> Neighborhood:
    columns = []
    for _ in range(dims):
        kernel = draw(small)
        stride = draw(st.integers(1, kernel))
        columns.append((kernel, draw(st.integers(1, 3)), stride, draw(st.booleans())))
    return Neighborhood(*(tuple(values) for values in zip(*columns, strict=True)))


def documents(n: int, m: int) -> st.SearchStrategy[Document]:
    numbers = st.lists(st.integers(0, 2), min_size=BATCH * m, max_size=BATCH * m)

    def build(values: list[int]) -> Document:
        keys = torch.tensor(values).view(BATCH, m)
        return Document(keys[:, m - n :], keys)

    return numbers.map(build)


def padding(m: int) -> st.SearchStrategy[Real]:
    flags = st.lists(st.booleans(), min_size=BATCH * m, max_size=BATCH * m)
    return flags.map(lambda values: Real(torch.tensor(values).view(BATCH, m)))


@st.composite
def block_charts(draw: Callable[..., Any]) -> Blocks:
    """A block map of random size for one or all heads; positions may lie beyond it."""
    rows, columns = draw(small), draw(small)
    heads = draw(st.sampled_from([1, HEADS]))
    size = heads * rows * columns
    flags = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return Blocks(torch.tensor(flags).view(1, heads, rows, columns), draw(small))


def simple(n: int, m: int) -> dict[type[Mask], st.SearchStrategy[Any]]:
    """How to draw each mask that is not made of others."""
    return {
        Causal: st.just(Causal()),
        Given: st.just(Given(lambda b, h, i, j: (i + j + h + b) % 3 > 0)),
        Real: padding(m),
        Document: documents(n, m),
        Window: small.map(Window),
        Sinks: st.integers(0, 4).map(Sinks),
        PowerReach: st.builds(PowerReach, small, small, st.integers(0, 2)),
        Shards: shards(),
        Neighborhood: neighborhoods(),
        Blocks: block_charts(),
        Ahead: st.integers(0, 4).map(Ahead),
        ShiftedGroups: st.builds(
            ShiftedGroups,
            st.sampled_from([2, 4, 6]),
            st.sampled_from([0.0, 0.5, 1.0]),
            st.booleans(),
        ),
        Elastic: st.builds(
            Elastic, st.integers(-4, 6), st.floats(0, 1, width=16), small, st.integers(0, 2)
        ),
    }


def composed(n: int, m: int) -> st.SearchStrategy[Mask]:
    return st.recursive(
        st.one_of(*simple(n, m).values()),
        lambda inner: st.one_of(
            st.builds(Both, inner, inner),
            st.builds(Either, inner, inner),
            st.builds(Outside, inner),
        ),
        max_leaves=4,
    )


@st.composite
def cases(draw: Callable[..., Any]) -> tuple[Mask, Frame]:
    """A mask and a frame without a grid: plain, shifted, padded or full of holes."""
    m = draw(st.integers(1, 14))
    n = draw(st.integers(1, m))
    kind = draw(st.sampled_from(["plain", "shifted", "padded", "holes"]))
    keys = torch.arange(m)[None]
    if kind == "shifted":
        keys = keys + draw(st.integers(1, 9))
    elif kind == "padded":
        keys = (draw(padding(m)).keys.long().cumsum(-1) - 1).clamp_min(0)
    elif kind == "holes":
        steps = draw(st.lists(st.integers(1, 4), min_size=BATCH * m, max_size=BATCH * m))
        keys = torch.tensor(steps).view(BATCH, m).cumsum(-1)
    return draw(composed(n, m)), Frame(BATCH, HEADS, keys[:, m - n :], keys)


@st.composite
def grids(draw: Callable[..., Any]) -> tuple[Mask, Frame]:
    """A neighbourhood on a grid of one to three axes after prefix tokens, perhaps with Causal."""
    sides = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    prefix = draw(st.integers(0, 2))
    cells = torch.arange(torch.tensor(sides).prod().item() + prefix)[None]
    mask: Mask = draw(neighborhoods(len(sides)))
    mask = mask & Causal() if draw(st.booleans()) else mask
    return mask, Frame(BATCH, HEADS, cells, cells, sides, prefix)


def whole(mask: Mask, frame: Frame) -> Tensor:
    """The dense mask with every axis written out."""
    return mask.dense(frame).expand(frame.batch, frame.heads, -1, -1)


def test_every_mask_is_tried() -> None:
    modules = [algebra]
    for info in pkgutil.iter_modules(regard.masks.__path__, "regard.masks."):
        modules.append(importlib.import_module(info.name))
    found = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Mask) and value is not Mask
    }
    assert found == {*simple(1, 1), Both, Either, Outside}


@TRIES
@given(st.one_of(cases(), grids()))
def test_dense_is_the_predicate_pair_by_pair(case: tuple[Mask, Frame]) -> None:
    mask, frame = case
    dense = whole(mask, frame)
    index = torch.cartesian_prod(*(torch.arange(size) for size in dense.shape))
    assert torch.equal(mask.mask_mod(frame)(*index.unbind(-1)), dense.flatten())
    one = index[len(index) // 2]
    assert mask.mask_mod(frame)(*one) == dense[tuple(one)]


@TRIES
@given(st.one_of(cases(), grids()), st.integers(1, 5))
def test_block_map_is_the_dense_mask_by_blocks(case: tuple[Mask, Frame], block: int) -> None:
    mask, frame = case
    dense, found = whole(mask, frame), mask.blocks(frame, block)
    some, full = found.some.expand_as(dense[..., ::block, ::block]), found.full
    full = full.expand_as(some)
    for b, h, i, j in itertools.product(*(range(size) for size in some.shape)):
        part = dense[b, h, i * block : (i + 1) * block, j * block : (j + 1) * block]
        assert some[b, h, i, j] == part.any()
        assert full[b, h, i, j] == part.all()
    assert found.density == pytest.approx(found.some.float().mean().item())


@TRIES
@given(st.one_of(cases(), grids()), small, small)
def test_bounds_err_to_the_safe_side(case: tuple[Mask, Frame], rows: int, columns: int) -> None:
    mask, frame = case
    dense = whole(mask, frame)
    some, full = mask.bounds(tiles_of(frame, rows, columns))
    shape = dense[..., ::rows, ::columns].shape
    some, full = some.expand(shape), full.expand(shape)
    for b, h, i, j in itertools.product(*(range(size) for size in shape)):
        part = dense[b, h, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        assert some[b, h, i, j] or not part.any()
        assert not full[b, h, i, j] or part.all()


@TRIES
@given(st.one_of(cases(), grids()))
def test_a_dead_key_is_never_seen_again(case: tuple[Mask, Frame]) -> None:
    mask, frame = case
    seen = whole(mask, frame)
    alive = mask.alive(frame.all()).expand(seen.shape)
    later = seen.flip(2).cummax(2).values.flip(2)  # by this query or a later one
    assert not (later & ~alive).any()


@TRIES
@given(cases())
def test_what_hides_the_future_hides_it(case: tuple[Mask, Frame]) -> None:
    mask, frame = case
    pairs = frame.all()
    for causal in (mask & Causal(), Causal() & mask | Sinks(2)):
        assert hides_future(causal)
        assert not (whole(causal, frame) & (pairs.key > pairs.query)).any()
    if hides_future(mask):
        assert not (whole(mask, frame) & (pairs.key > pairs.query)).any()


def test_window_or_sinks_leaks_no_future() -> None:
    positions = torch.arange(300)[None]
    mask = Causal() & Window(256) | Sinks(4)
    dense = mask.dense(Frame(1, 1, positions, positions))[0, 0]
    assert not dense.triu(1).any()
    assert dense[299].nonzero().flatten().tolist() == [0, 1, 2, 3, *range(44, 300)]


@settings(TRIES, max_examples=25)
@given(st.one_of(cases(), grids()))
def test_flex_attention_reads_the_predicate(case: tuple[Mask, Frame]) -> None:
    mask, frame = case
    dense = whole(mask, frame)
    mod, shape = mask.mask_mod(frame), dense.shape
    assert torch.equal(create_mask(mod, *shape, device="cpu"), dense)
    blocks = create_block_mask(mod, *shape, device="cpu", BLOCK_SIZE=4)
    assert torch.equal(
        blocks.to_dense().bool(), mask.blocks(frame, 4).some.expand(*shape[:2], -1, -1)
    )


# neighbourhoods


def window_of(i: int, n: int, kernel: int, dilation: int, stride: int, causal: bool) -> set[int]:
    """The rule on one axis, for one cell, in the words of the papers."""
    group, place = i % dilation, i // dilation
    size = len(range(group, n, dilation))
    lead = place // stride * stride + (stride - 1 if causal else stride // 2)
    lead = min(lead, size - 1)
    if causal:
        places = range(max(lead - kernel + 1, 0), place + 1)
    else:
        start = min(max(lead - kernel // 2, 0), max(size - kernel, 0))
        places = range(start, min(start + kernel, size))
    return {group + p * dilation for p in places}


@TRIES
@given(grids())
def test_neighborhood_is_the_product_of_its_axes(case: tuple[Mask, Frame]) -> None:
    mask, frame = case
    own = mask.left if isinstance(mask, Both) else mask
    assert isinstance(own, Neighborhood)
    assert frame.grid is not None
    axes, prefix = own.axes(len(frame.grid)), frame.prefix
    cells = list(itertools.product(*(range(side) for side in frame.grid)))
    expected = torch.ones(len(cells) + prefix, len(cells) + prefix, dtype=torch.bool)
    for i, query in enumerate(cells):
        near = [
            window_of(c, n, a.kernel, a.dilation, a.stride, a.causal)
            for c, n, a in zip(query, frame.grid, axes, strict=True)
        ]
        for j, key in enumerate(cells):
            inside = all(c in window for c, window in zip(key, near, strict=True))
            expected[i + prefix, j + prefix] = inside
    assert torch.equal(own.dense(frame)[0, 0], expected)
    index, good = own.near(frame.grid, len(cells))
    table = torch.zeros(len(cells), len(cells)).scatter_add(1, index, good.float())
    assert torch.equal(table, expected[prefix:, prefix:].float())


@pytest.mark.parametrize(("kernel", "stride"), [(4, 1), (5, 2), (5, 5), (6, 4)])
def test_windows_keep_their_size_and_number(kernel: int, stride: int) -> None:
    cells = torch.arange(14)[None]
    dense = Neighborhood(kernel, stride=stride).dense(Frame(1, 1, cells, cells))[0, 0]
    assert dense.sum(-1).eq(kernel).all()
    leaders = {min(p // stride * stride + stride // 2, 13) for p in range(14)}
    assert len(dense.unique(dim=0)) <= len(leaders) == -(-14 // stride)


def test_a_stride_visits_no_more_blocks() -> None:
    cells = torch.arange(64)[None]
    frame = Frame(1, 1, cells, cells)
    visited = [Neighborhood(8, stride=s).blocks(frame, 8).density for s in (1, 2, 4, 8)]
    assert visited == sorted(visited, reverse=True)
    assert visited[-1] == 1 / 8


def test_dilation_is_attention_on_every_other_cell() -> None:
    cells = torch.arange(11)[None]
    dense = Neighborhood(3, dilation=2).dense(Frame(1, 1, cells, cells))[0, 0]
    for group in (0, 1):
        part = torch.arange(len(range(group, 11, 2)))[None]
        alone = Neighborhood(3).dense(Frame(1, 1, part, part))[0, 0]
        assert torch.equal(dense[group::2, group::2], alone)
    assert not dense[0::2, 1::2].any()


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 2, "causal": (True, False)}])
def test_gathered_is_dense_under_padding_prefix_and_groups(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    n = 2 + 5 * 6
    q = torch.randn(2, 4, n, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, n, 8).double(), torch.randn(2, 1, n, 3).double()
    real = torch.rand(2, n) > 0.2
    call = Call(grid=(5, 6), prefix=2, padding=real, query_padding=real)
    results = [
        gna(q, k, v, call, kernel=3, impl=i, **{"stride": 1, **options})
        for i in ("dense", "gathered")
    ]
    torch.testing.assert_close(results[1].output, results[0].output)
    cells = torch.arange(n)  # on a grid a token's place does not depend on padding
    mask = Neighborhood(
        3, options.get("dilation", 1), options.get("stride", 1), options.get("causal", False)
    )
    placed = call.but(query_positions=cells, key_positions=cells)
    expected = attend(q, k, v, placed, Scored(mask=mask), impl="dense")
    torch.testing.assert_close(results[0].output, expected.output)


# powers and shards


def test_powers_reach_everything_in_ten_layers() -> None:
    positions = torch.arange(1024)[None]
    mask = PowerReach(block=1, window=1, sinks=0)
    edges = mask.dense(Frame(1, 1, positions, positions))[0, 0].float()
    assert edges.sum(-1).max() == 11
    reached = edges
    for _ in range(8):
        reached = (reached @ edges > 0).float()
    assert not torch.equal(reached, torch.ones(1024, 1024).tril())
    assert torch.equal((reached @ edges > 0).float(), torch.ones(1024, 1024).tril())


@pytest.mark.parametrize(("stride", "step"), [(4, None), (3, None), (4, 1)])
def test_heads_together_see_everything(stride: int, step: int | None) -> None:
    positions = torch.arange(64)[None]
    mask = Causal() & Shards(block=4, local=1, stride=stride, step=step)
    dense = mask.dense(Frame(1, HEADS, positions, positions))[0]
    assert torch.equal(dense.any(0), torch.ones(64, 64, dtype=torch.bool).tril())


def test_an_absolute_stripe_seen_later_was_seen_before() -> None:
    positions = torch.arange(64)[None]
    seen = (Causal() & Shards(block=4, local=2, stride=4)).blocks(
        Frame(1, HEADS, positions, positions), 4
    )
    blocks = seen.some[0]
    beyond = torch.arange(16)[:, None] > torch.arange(16)
    appears = blocks[:, 1:] & ~blocks[:, :-1] & beyond[:-1]
    assert not appears.any()


@pytest.mark.parametrize(
    "build",
    [
        lambda: PowerReach(block=0),
        lambda: PowerReach(sinks=-1),
        lambda: Shards(stride=0),
        lambda: Shards(local=-1),
        lambda: Neighborhood(0),
        lambda: Neighborhood(3, stride=4),
        lambda: Neighborhood((3, 3), dilation=(1, 1, 1)),
    ],
)
def test_senseless_values_are_refused(build: Callable[[], Mask]) -> None:
    with pytest.raises(ArgumentError):
        build()


def test_options_for_another_grid_are_refused() -> None:
    cells = torch.arange(12)[None]
    with pytest.raises(ArgumentError, match="axes"):
        Neighborhood((3, 3, 3)).dense(Frame(1, 1, cells, cells, (3, 4)))
    with pytest.raises(ArgumentError, match="pattern_heads"):
        Shards(pattern_heads=3).dense(Frame(1, HEADS, cells, cells))
