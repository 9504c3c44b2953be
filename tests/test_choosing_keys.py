"""Treatments that keep every key and read some: choices, their memory, and reading few."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mask import Causal
from regard.core.moment import Moment, Site
from regard.core.narrowing import narrowed
from regard.core.treating import weights_of
from regard.core.weights import group_values
from regard.importance.query_blocks import query_blocks
from regard.importance.tree_search import Search, tree_search
from regard.operators import hip as hip_file
from regard.operators.hip import hip
from regard.plan import Plan, Step
from regard.testing.patient import Patient
from regard.treatments.delta_pages import DeltaPages
from regard.treatments.tidal import CARD as TIDAL
from regard.treatments.tidal import Tidal
from regard.treatments.token_select import TokenSelect


def moment(
    q: Tensor, k: Tensor, v: Tensor, *, layer: int = 0, shared: dict[str, Any] | None = None
) -> Moment:
    """A decoding step whose queries are the newest tokens; nothing is padded."""
    batch, heads, n, width = q.shape
    m, kv_heads = k.shape[2], k.shape[1]
    place = torch.arange(m).expand(batch, -1)
    visible = torch.ones(n, m, dtype=torch.bool).tril(m - n).expand(batch, 1, -1, -1)
    return Moment(
        Site("attention", "attention", layer, 3, heads, kv_heads),
        "decode",
        tuple(range(heads)),
        q,
        k,
        v,
        width**-0.5,
        query_positions=place[:, m - n :],
        query_real=torch.ones(batch, n, dtype=torch.bool),
        key_positions=place[:, None],
        real=torch.ones(batch, 1, m, dtype=torch.bool),
        sight=lambda: visible,
        length=torch.full((batch,), m),
        shared={} if shared is None else shared,
    )


def randoms(n: int, m: int, *, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """q of 4 heads, k and v of 2."""
    shapes = ((batch, 4, n, 8), (batch, 2, m, 8), (batch, 2, m, 8))
    q, k, v = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_reading_few_keys_is_hiding_the_others(heads: int, biased: bool) -> None:
    torch.manual_seed(0)
    at = moment(*randoms(1, 40))
    at.visible = torch.rand(2, heads, 1, 40) < 0.15
    at.visible[0, 0] = False
    at.visible[0, 0, 0, 3] = True
    if biased:
        at.bias = torch.randn(1, 4, 1, 40, dtype=torch.float64)
    few = narrowed(at)
    assert few.k.shape[2] < 20, "it narrows"
    expected, got = (group_values(weights_of(x), x.v) for x in (at, few))
    torch.testing.assert_close(got, expected)


def test_many_wanted_keys_are_left_where_they_are() -> None:
    at = moment(*randoms(1, 40))
    assert narrowed(at) is at
    several = moment(*randoms(2, 40))
    assert narrowed(several) is several


def test_an_oracle_finds_the_best_blocks() -> None:
    torch.manual_seed(1)
    q, k = torch.randn(1, 2, 3, 4, 8), torch.randn(1, 2, 64, 8)
    reach = torch.tensor([[32, 64, 64]])
    there = torch.ones(1, 3, 4, dtype=torch.bool)
    search = Search(q, there, k, reach, reach, keep=8, block=2, representative="oracle")
    scores = search.scores(torch.arange(32).expand(1, 2, 3, -1))
    best = scores.topk(4).indices.sort(-1).values
    assert torch.equal(tree_search(search).index, best)


@pytest.mark.parametrize("representative", ["center", "first", "last"])
def test_smooth_scores_are_searched_without_loss(representative: Any) -> None:
    """q·k falls with the distance from token 200: what is kept is what is nearest."""
    place = torch.arange(256.0)
    k = -((place - 200).abs())[None, None, :, None]
    reach = torch.tensor([[256]])
    there = torch.ones(1, 1, 1, dtype=torch.bool)
    search = Search(torch.ones(1, 1, 1, 1, 1), there, k, reach, reach, 16, 1, representative)
    found = tree_search(search).index[0, 0, 0]
    assert len(set(found.tolist())) == 16
    assert found.sub(200).abs().max() <= 9


@pytest.mark.parametrize("query_block", [1, 4, (8, 2)])
def test_hip_gathers_what_it_would_leave_visible(
    monkeypatch: pytest.MonkeyPatch, query_block: int | tuple[int, int]
) -> None:
    torch.manual_seed(2)
    q, k, v = randoms(50, 50)
    found = []
    for least in (0, 10**9):
        monkeypatch.setattr(hip_file, "GATHERED", least)
        call = Call(mask=Causal())
        result = hip(q, k, v, call, keep=6, block=3, query_block=query_block, window=5, sinks=2)
        found.append(result.output)
    torch.testing.assert_close(*found)


def test_hip_blocks_queries_by_position() -> None:
    torch.manual_seed(3)
    q, k, v = randoms(41, 41, batch=1)
    options: dict[str, Any] = {"keep": 6, "query_block": 8, "window": 5, "sinks": 2}
    alone = hip(q, k, v, Call(mask=Causal()), **options).output
    for left in (True, False):
        pads = (0, 0, 9, 0) if left else (0, 0, 0, 9)
        padded = [torch.nn.functional.pad(x, pads, value=float("nan")) for x in (q, k, v)]
        real = torch.ones(1, 50, dtype=torch.bool)
        real[:, slice(0, 9) if left else slice(41, 50)] = False
        both = hip(*padded, Call(mask=Causal(), padding=real), **options).output
        torch.testing.assert_close(both[:, :, real[0]], alone)


def test_blocks_hold_each_query_once() -> None:
    positions = torch.tensor([[5, 6, 7, 8, 9, 10]])
    blocks = query_blocks(positions, None, 4)
    held = blocks.rows[blocks.there].tolist()
    assert sorted(held) == [0, 1, 2, 3, 4, 5]
    assert blocks.counts()[0, :2].tolist() == [3, 3], "5-7 and 8-10"
    x = torch.randn(1, 2, 6, 3)
    assert torch.equal(blocks.back(blocks.cut(x).flatten(2, 3)), x)


def test_tidal_reads_exactly_k_keys_of_the_layer_before() -> None:
    torch.manual_seed(4)
    q, k, v = randoms(1, 30)
    treatment, shared = Tidal(k=5, select_layers=(0,)), {}
    assert treatment.visible(moment(q, k, v, shared=shared)) is None, "it looks at everything"
    seen = treatment.visible(moment(q, k, v, layer=1, shared=shared))
    assert seen is not None
    assert (seen.sum(-1) == 5).all()
    scores = q @ k.repeat_interleave(2, 1).mT
    assert torch.equal(seen, torch.zeros_like(seen).scatter_(3, scores.topk(5).indices, True))


def test_several_tokens_choose_as_one_by_one() -> None:
    patient = Patient(TIDAL)
    one, several = (
        patient.decoded(patient.plan(), patient.ids, chunks=chunks)
        for chunks in ((1,) * 6, (3, 2, 1))
    )
    torch.testing.assert_close(several, one)


@pytest.mark.parametrize("name", ["tidal", "delta_pages"])
def test_a_layer_without_its_chooser_is_refused(name: str) -> None:
    patient = Patient(TIDAL)
    options = {"select_layers": [1]} if name == "tidal" else {"full_layers": [0]}
    plan = Plan(steps=(Step(treatment=name, options=options, layers=(2,)),))
    with pytest.raises(UnsupportedError, match="which chooses"):
        patient.decoded(plan, patient.ids)


def test_pages_vote_by_the_greatest_or_the_mean_head() -> None:
    torch.manual_seed(5)
    at = moment(*randoms(1, 32))
    tokens = weights_of(at)
    greatest, mean = (
        DeltaPages(page=4, pages=3, recent=1, full_layers=(0,), aggregate=how).scores(at)
        for how in ("max", "mean")
    )
    torch.testing.assert_close(greatest[:, 0], tokens.amax(1)[:, 0].unflatten(-1, (8, 4)).sum(-1))
    torch.testing.assert_close(mean[:, 0], tokens.mean(1)[:, 0].unflatten(-1, (8, 4)).sum(-1))


def test_votes_do_not_depend_on_the_order_of_heads() -> None:
    torch.manual_seed(6)
    q, k, v = randoms(1, 40)
    treatment = TokenSelect(init=2, selected=5, local=4, chunk=1)
    seen = treatment.visible(moment(q, k, v))
    order = [2, 3, 0, 1]
    turned = treatment.visible(moment(q[:, order], k[:, [1, 0]], v[:, [1, 0]]))
    assert seen is not None
    assert turned is not None
    assert torch.equal(seen, turned)
    assert (seen.sum(-1) == 11).all()


def test_equal_heads_vote_as_one() -> None:
    torch.manual_seed(7)
    q, k, v = (x[:, :1] for x in randoms(1, 40))
    q4, k2, v2 = q.expand(-1, 4, -1, -1), k.expand(-1, 2, -1, -1), v.expand(-1, 2, -1, -1)
    treatment = TokenSelect(init=2, selected=5, local=4, chunk=1)
    seen = treatment.visible(moment(q4, k2, v2))
    assert seen is not None
    middle = (q @ k.mT)[..., 2:36]
    best = torch.zeros_like(middle, dtype=torch.bool)
    assert torch.equal(seen[..., 2:36], best.scatter_(3, middle.topk(5).indices, True))


def test_a_like_query_reuses_the_choice() -> None:
    torch.manual_seed(8)
    q, k, v = randoms(1, 40)
    treatment = TokenSelect(init=2, selected=5, local=4, chunk=1, reuse_above=0.9)
    at = moment(q, k, v)
    first = treatment.visible(at)
    assert first is not None
    like = moment(1.1 * q, k.flip(2), v)
    like.memory = at.memory
    again = treatment.visible(like)
    assert again is not None
    assert torch.equal(again, first), "the same query, though the keys changed"
    unlike = moment(-q, k, v)
    unlike.memory = at.memory
    other = treatment.visible(unlike)
    assert other is not None
    assert not torch.equal(other, first)


def test_a_chunk_of_a_prompt_reads_the_same() -> None:
    torch.manual_seed(9)
    at = replace(moment(*randoms(24, 24)), phase="prefill")
    seen = TokenSelect(init=2, selected=3, local=6, chunk=6).visible(at)
    assert seen is not None
    chunks = seen[:, 0].unflatten(1, (4, 6))
    assert torch.equal(chunks, chunks[:, :, :1].expand_as(chunks))
    assert chunks[:, 3, 0].sum(-1).tolist() == [11, 11]


def test_token_select_needs_every_head() -> None:
    plan = Plan(steps=(Step(treatment="token_select", heads=(0, 1)),))
    with pytest.raises(UnsupportedError, match="vote"):
        plan.resolve(Patient(TIDAL).model)


def test_a_search_serves_several_tokens() -> None:
    patient = Patient(TIDAL)
    options = {"keys": 4, "window": 3, "sinks": 1, "query_block": 1}
    found = []
    for refresh in (1, 3):
        plan = Plan(steps=(Step(treatment="hip", options=options | {"refresh": refresh}),))
        one, several = (patient.decoded(plan, patient.ids, chunks=c) for c in ((1,) * 6, (2, 3, 1)))
        torch.testing.assert_close(several, one)
        found.append(one)
    torch.testing.assert_close(found[1][:, :2], found[0][:, :2])
    assert not torch.allclose(found[1], found[0]), "a later token reads what an earlier one found"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Tidal, {"k": 0}),
        (Tidal, {"select_layers": (-1,)}),
        (DeltaPages, {"full_layers": (1,)}),
        (DeltaPages, {"pages": 2, "recent": 3}),
        (TokenSelect, {"chunk": 600}),
        (TokenSelect, {"kernel": 2}),
        (TokenSelect, {"reuse_above": 2.0}),
    ],
)
def test_bad_options_are_refused(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        kind(**options)
