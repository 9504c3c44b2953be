"""The selected family: choosing, its two executors, and what each selecting mechanism promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard.core.blocks import tiles_of
from regard.core.call import Call
from regard.core.errors import ArgumentError
from regard.core.frame import Frame
from regard.core.mask import Causal
from regard.core.scored import attend
from regard.core.selected import Selected, choose, select
from regard.core.sequence import in_sequence
from regard.core.state import state_bytes
from regard.core.weights import Scored
from regard.importance.clusters import commitment, k_means_step, last_members, unit
from regard.operators.block_topk import block_topk
from regard.operators.cca import CoreOrLocal, cca
from regard.operators.dma import DynamicMask
from regard.operators.landmark import GroupedSoftmax
from regard.operators.routing_transformer import RoutingTransformer
from regard.testing.compare import close, same

quick = settings(max_examples=40, deadline=None)
INF = float("inf")


def heads(n: int, m: int, seed: int = 0, width: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """q (2,4,n,4), k and v (2,2,m,4)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 4, n, width), (2, 2, m, width), (2, 2, m, width)
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return q, k, v


@st.composite
def scenes(draw: Any) -> dict[str, Any]:
    """A selecting mechanism on random tiles, with or without causality and padding."""
    rows, tiles = draw(st.integers(0, 4)), draw(st.integers(0, 5))
    return {
        "rows": rows,
        "tiles": tiles,
        "query_tile": draw(st.integers(1, 3)),
        "key_tile": draw(st.integers(1, 3)),
        "keep": draw(st.integers(1, 6)),
        "shared": draw(st.booleans()),
        "causal": draw(st.booleans()),
        "padded": draw(st.booleans()),
        "seed": draw(st.integers(0, 10**6)),
    }


@quick
@given(st.integers(1, 6), st.integers(0, 10**6), st.booleans())
def test_few_of_many_are_chosen_as_by_sorting_all(keep: int, seed: int, ties: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    importance = torch.randn(2, 3, 4, 60, generator=draw)
    importance = importance.round() if ties else importance
    allowed = torch.rand(2, 1, 4, 60, generator=draw) < 0.9
    allowed[0, 0, 1] = False
    importance[1, 1, 2, 7] = INF
    ranked = importance.masked_fill(~allowed, -INF).flip(-1)
    order = 59 - ranked.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    same(choose(importance, allowed, keep).index, order, "the first few")


@quick
@given(scenes())
def test_masked_equals_gathered_with_gradients(scene: dict[str, Any]) -> None:
    n, m = scene["rows"] * scene["query_tile"], scene["tiles"] * scene["key_tile"]
    inputs = [x.requires_grad_() for x in heads(n, m, scene["seed"])]
    generator = torch.Generator().manual_seed(scene["seed"])
    shape = (1, 4, 1 if scene["shared"] else scene["rows"], scene["tiles"])
    importance = torch.randint(0, 4, shape, generator=generator).double()  # many ties
    bias = torch.randn(1, 4, m, generator=generator, dtype=torch.float64).requires_grad_()
    padding = torch.rand(2, m, generator=generator) < 0.7 if scene["padded"] else None
    call = Call(mask=Causal() if scene["causal"] else None, padding=padding)
    method = Selected(
        importance, scene["keep"], scene["query_tile"], scene["key_tile"], Scored(key_bias=bias)
    )
    found = []
    for impl in ("masked", "gathered"):
        out = select(*inputs, call, method, impl=impl).output
        gradients = torch.autograd.grad(out.sin().sum(), [*inputs, bias], allow_unused=True)
        found.append(
            [
                out,
                *(
                    0 * x if g is None else g
                    for g, x in zip(gradients, [*inputs, bias], strict=True)
                ),
            ]
        )
    for a, b in zip(*found, strict=True):
        close(b, a, "gathered against masked", 1e-10)


@quick
@given(st.integers(1, 7), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 10**6))
def test_choice_is_the_sorted_one(
    tiles: int, keep: int, shared: bool, ties: bool, seed: int
) -> None:
    """Against a plain loop: best first, ties to the later tile, hidden tiles never, budget kept."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 1, 1 if shared else 3, tiles)
    importance = torch.randn(shape, generator=generator)
    importance = importance.round() if ties else importance
    importance = importance.masked_fill(torch.rand(shape, generator=generator) < 0.1, -INF)
    allowed = torch.rand(2, 1, 3, tiles, generator=generator) < 0.6
    choice = choose(importance, allowed, keep)
    assert choice.index.shape == (2, 1, 3, min(keep, tiles))
    for b in range(2):
        for t in range(3):
            row = importance[b, 0, 0 if shared else t].tolist()
            seen = [c for c in range(tiles) if allowed[b, 0, t, c]]
            expected = sorted(seen, key=lambda c: (row[c], c), reverse=True)[:keep]
            assert choice.index[b, 0, t][choice.valid[b, 0, t]].tolist() == expected
            assert choice.mask(tiles)[b, 0, t].nonzero().flatten().tolist() == sorted(expected)


def test_wrong_selections_are_refused() -> None:
    q, k, v = heads(6, 6)
    with pytest.raises(ArgumentError, match="keep"):
        select(q, k, v, Call(), Selected(torch.zeros(1, 1, 1, 6), keep=0))
    with pytest.raises(ArgumentError, match="importance"):
        select(q, k, v, Call(), Selected(torch.zeros(1, 1, 2, 6), keep=1))
    with pytest.raises(ArgumentError, match="tiles"):
        select(q, k, v, Call(), Selected(torch.zeros(1, 1, 1, 2), keep=1, key_tile=4))
    with pytest.raises(ArgumentError, match="impl"):
        select(q, k, v, Call(), Selected(torch.zeros(1, 1, 1, 6), 1), impl="fast")  # type: ignore[arg-type]


def test_keys_in_sequence_ignore_where_padding_stands() -> None:
    q, k, _ = heads(2, 5)
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 1, 0]]).bool()
    sequence = in_sequence(Call(padding=padding, query_positions=torch.tensor([0, 2])), q, k)
    assert sequence.alignment.order[:, :3].tolist() == [[2, 3, 4], [0, 2, 3]]
    assert sequence.reach.tolist() == [[1, 3], [1, 3]]


@quick
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6))
def test_last_members_against_a_loop(m: int, clusters: int, window: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(0, clusters, (1, 1, 3), generator=generator)
    theirs = torch.randint(-1, clusters, (1, 1, m), generator=generator)
    order = torch.randperm(m, generator=generator)[None, None]
    limit = torch.randint(0, m + 1, (1, 1, 3), generator=generator)
    choice = last_members(own, theirs, order, limit, window)
    for i in range(3):
        some = order[0, 0, : limit[0, 0, i]].tolist()
        members = [j for j in some if theirs[0, 0, j] == own[0, 0, i]]
        got = choice.index[0, 0, i][choice.valid[0, 0, i]].tolist()
        assert got == members[::-1][:window]


def test_k_means_keeps_empty_clusters_and_commitment_vanishes_at_the_centroids() -> None:
    centroids = unit(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]]))
    x = unit(torch.tensor([[[[1.0, 0.1], [1.0, -0.1], [0.2, 1.0]]]]))
    after = k_means_step(x, centroids)
    same(after[0, 2], centroids[0, 2], "an empty cluster moved")
    close(after[0, 0], torch.tensor([1.0, 0.0]), "mean of two", 1e-6)
    assert commitment(x, centroids) > 0
    assert commitment(centroids[None], centroids) == 0
    hidden = torch.tensor([[True, True, False]])
    spoiled = x.index_fill(2, torch.tensor([2]), float("nan"))
    close(k_means_step(spoiled, centroids, hidden)[0, 1], centroids[0, 1], "padding", 1e-6)
    assert torch.isfinite(commitment(spoiled, centroids, hidden))


def test_routing_moves_its_centroids_only_when_asked() -> None:
    torch.manual_seed(0)
    module = RoutingTransformer(4, 4, clusters=3, window=5).double()
    q, k, v = heads(7, 7)
    before, call = module.centroids.clone(), Call(mask=Causal(), notes={})
    module(q, k, v, call)
    same(module.centroids, before, "forward moved the centroids")
    assert (call.notes or {})["commitment_loss"][0] > 0
    module.update(q, decay=0.0)
    close(module.centroids, k_means_step(unit(q), before), "one whole step", 1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_balanced_routing_in_one_cluster_is_softmax(causal: bool) -> None:
    q, k, v = heads(6, 6)
    padding = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]).bool()
    call = Call(mask=Causal() if causal else None, padding=padding, query_padding=padding)
    module = RoutingTransformer(4, 4, clusters=1, window=6, balanced=True).double()
    expected = attend(q, k, v, call, Scored()).output
    close(module(q, k, v, call).output * (1 + 1e-5), expected, "one cluster", 1e-12)


def test_a_landmark_weighs_its_whole_block() -> None:
    scores = torch.randn(1, 1, 9, 9, dtype=torch.float64)
    marks = torch.arange(9)[None] % 3 == 2
    visible = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    count = visible.sum(-1, keepdim=True)
    plain = GroupedSoftmax(marks)(scores, visible, count)
    close(plain.sum(-1), torch.ones(1, 1, 9).double(), "rows", 1e-12)
    assert not plain[..., marks[0]].any()
    raised = scores.clone()
    raised[..., 2] += 0.7
    ratio = (GroupedSoftmax(marks)(raised, visible, count) / plain)[0, 0, 7]
    close(ratio[0], ratio[1], "one factor for the block", 1e-12)
    assert ratio[0] > 1 > ratio[3]
    same(GroupedSoftmax(marks, 2)(scores, visible, count), plain, "two blocks are all there are")
    few = GroupedSoftmax(marks, 1)(scores, visible, count)[0, 0, 7]
    best = 0 if scores[0, 0, 7, 2] > scores[0, 0, 7, 5] else 3
    assert few.nonzero().flatten().tolist() == [best, best + 1, 6, 7]


def test_only_kept_keys_teach_the_rating() -> None:
    q, k, v = heads(5, 5)
    torch.manual_seed(0)
    module = DynamicMask(4, 4, keep=2, groups=2, bias_form="linear").double()
    torch.nn.init.constant_(module.A, 1.0)
    v = v.requires_grad_()
    rating = module.rating(v)
    kept = choose(rating[:, :, None], torch.ones(1, 1, 1, 5).bool(), 2).mask(5)[:, :, 0]
    (gradient,) = torch.autograd.grad(module(q, k, v.detach(), Call()).output.sum(), [module.A])
    assert gradient.abs().sum() > 0
    reached = torch.autograd.grad(module(q, k, v, Call()).output.sum(), v)[0].abs().sum(-1) > 0
    assert torch.equal(reached.any(1), kept.any(1))


def test_block_topk_reads_its_budget() -> None:
    q, k, _ = heads(12, 12)
    basis = torch.eye(12, dtype=torch.float64).expand(2, 2, -1, -1)
    weights = block_topk(q, k, basis, Call(mask=Causal()), block=3, keep=2).output
    blocks = (weights > 0).unflatten(-1, (4, 3)).any(-1)
    assert blocks.sum(-1).max() == 2
    own = torch.arange(12) // 3
    assert blocks[:, :, torch.arange(12), own].all()


@pytest.mark.parametrize(("group", "local"), [(1, 1), (3, 1), (4, 6), (2, 30)])
def test_cores_and_near_tokens_cover_the_past_once(group: int, local: int) -> None:
    q, k, _ = heads(13, 13)
    basis = torch.eye(13, dtype=torch.float64).expand(2, 2, -1, -1)
    call = Call(mask=Causal())
    weights = cca(q, k, basis, call, group=group, local=local).output
    close(weights.sum(-1), torch.ones(2, 4, 13).double(), "rows", 1e-12)
    past = torch.ones(13, 13).tril() > 0
    assert torch.equal(weights > 0, past.expand_as(weights))


def test_cores_shrink_the_state_and_let_tiles_skip() -> None:
    q, k, v = heads(400, 400)
    results = [
        cca(q, k, v, Call(mask=Causal()), group=8, local=20, impl=impl)
        for impl in ("dense", "tiled")
    ]
    close(results[1].output, results[0].output, "tiled against dense", 1e-10)
    assert state_bytes(results[0].state) < 0.4 * state_bytes([k, v])
    mask = CoreOrLocal(cores=50, group=8, local=20)
    ends, places = torch.arange(50) * 8 + 7, torch.arange(400)
    frame = Frame(1, 1, places[None], torch.cat([ends, places])[None])
    some, full = mask.bounds(tiles_of(frame, 32, 32))
    exact = mask.blocks(frame, 32)
    assert not (exact.some & ~some).any()
    assert not (full & ~exact.full).any()
    assert some.float().mean() < 1.3 * exact.density
