"""Readings by known answers: drains, contributions, concentration, information, rings; penalties
and summaries that go with them.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from regard.atlases.depth import by_depth, entropy_bins
from regard.atlases.record import Atlas, Row
from regard.atlases.survey import atlas
from regard.core.catalog import probe_cards
from regard.core.cutting import moment_of
from regard.core.errors import ArgumentError, UnknownNameError, UnsupportedError
from regard.core.incoming import Memory, bare
from regard.core.observe import Seen
from regard.core.passage import Passage
from regard.core.probe import Finding, Look, Reading, look_at, measured, plain_look
from regard.core.shown import observed, tile
from regard.importance.entropy_penalty import entropy_penalty
from regard.importance.map_distillation import map_divergence
from regard.importance.token_weights import rescaled
from regard.probes.concentration import Concentration
from regard.probes.contribution import Contribution
from regard.probes.copying import Copying
from regard.probes.distance import Distance
from regard.probes.drains import Drains
from regard.probes.mutual_information import MutualInformation
from regard.probes.rings import Rings
from regard.testing.tiny import prompt, tiny_decoder

N = 12
GRID = (3, 4)
MORE = {"drains": Drains(), "contribution": Contribution(), "rings": Rings(6)}


def full_look(heads: Tensor | None = None) -> Look:
    """A causal call of 4 heads over 2 key heads, or of some of its heads, two sequences, with all a
    reading may ask for; the tokens are taken for an image.
    """
    source = torch.Generator().manual_seed(5)
    q, k, v = (
        torch.randn(2, 4, N, 6, generator=source, dtype=torch.float64)[:, : 4 // group]
        for group in (1, 2, 2)
    )
    if heads is not None:
        q, k, v = q[:, heads], *(x.repeat_interleave(2, 1)[:, heads] for x in (k, v))
    at = moment_of(bare(q, k, v), tuple(range(4)), None, Memory(), None)
    output = torch.randn(2, 4, N, 6, generator=source, dtype=torch.float64)
    stream = torch.randn(2, N, 24, generator=source, dtype=torch.float64)
    output = output if heads is None else output[:, heads]
    return replace(look_at(at), output=output, stream=stream, grid=GRID)


def streamed(probe: Reading, look: Look) -> Finding:
    tally = probe.begin(look)
    assert look.at is not None
    for seen in observed(look.at):
        tally.add(seen)
    return tally.found()


def on_grid(
    weights: Tensor, probe: Reading, grid: tuple[int, int] = GRID, prefix: int = 0
) -> Finding:
    """A reading's numbers for a full map (1,1,n,n) over an image."""
    tally = probe.begin(replace(plain_look(weights), grid=grid, prefix=prefix))
    tally.add(tile(weights, causal=False))
    return tally.found()


def uniform(n: int = N) -> Tensor:
    return torch.full((1, 1, n, n), 1 / n, dtype=torch.float64)


def identity(n: int = N) -> Tensor:
    return torch.eye(n, dtype=torch.float64)[None, None]


def column(n: int = N, key: int = 3) -> Tensor:
    return torch.eye(n, dtype=torch.float64)[key].expand(1, 1, n, n)


def nmi(weights: Tensor) -> float:
    return float(measured(MutualInformation(), weights, causal=False).metrics["nmi"])


def test_mutual_information() -> None:
    assert nmi(identity()) == pytest.approx(1)
    assert nmi(uniform()) == pytest.approx(0)
    assert nmi(column()) == 0  # 0/0
    halves = torch.block_diag(uniform(6)[0, 0], uniform(6)[0, 0])[None, None]
    assert nmi(halves) == pytest.approx(math.log(2) / math.log(12))


def test_tokens_before_the_image_do_not_count() -> None:
    """With a class token that everybody looks at half, the rest is what it was."""
    for inner in (identity(), uniform()):
        whole = torch.zeros(1, 1, N + 1, N + 1, dtype=torch.float64)
        whole[..., 0] = 1.0
        whole[..., 1:, 0], whole[..., 1:, 1:] = 0.5, inner / 2
        for probe in (MutualInformation(), Rings(4)):
            without, found = on_grid(inner, probe), on_grid(whole, probe, prefix=1)
            for key, value in without.metrics.items():
                assert float(found.metrics[key]) == pytest.approx(float(value), abs=1e-12)
            for key, value in without.profiles.items():
                assert torch.allclose(found.profiles[key], value, atol=1e-12)


def test_rings() -> None:
    own = on_grid(identity(), Rings(4))
    assert torch.allclose(own.profiles["rings"], torch.tensor([1.0, 0, 0, 0]).double())
    assert float(own.metrics["grid_distance"]) == 0
    every = on_grid(uniform(), Rings(6)).profiles["rings"][0, 0]
    assert torch.allclose(every[:4], torch.full((4,), 1 / N, dtype=torch.float64))
    assert every[4:].isnan().all()  # no patch of a 3 x 4 image has such a ring
    right = torch.eye(N).double().roll(1, 1)[None, None]  # the next patch, in reading order
    row = on_grid(right, Rings(4), (1, N)).metrics["grid_distance"]
    assert float(row) == pytest.approx((N - 1 + N - 1) / N)


def test_rings_as_defined() -> None:
    """Against the definition, patch by patch."""
    weights = torch.rand(1, 1, N, N, dtype=torch.float64).softmax(-1)
    found = on_grid(weights, Rings(4)).profiles["rings"][0, 0]
    places = [divmod(i, GRID[1]) for i in range(N)]
    for k in range(4):
        means = []
        for i, (r, c) in enumerate(places):
            ring = [j for j, (y, x) in enumerate(places) if max(abs(r - y), abs(c - x)) == k]
            if ring:
                means.append(float(weights[0, 0, i, ring].mean()))
        assert float(found[k]) == pytest.approx(sum(means) / len(means))


def test_rings_need_an_image() -> None:
    with pytest.raises(UnsupportedError, match="rings"):
        Rings().begin(plain_look(uniform()))
    found = atlas(tiny_decoder(), [{"input_ids": prompt(20)}], ["rings", "drains"])
    assert any("rings" in note for note in found.notes.values())
    assert "value_first" in found.metrics
    with pytest.raises(ArgumentError):
        Rings(0)


def test_concentration() -> None:
    found = measured(Concentration(top=0.25), uniform(), causal=False)
    assert float(found.metrics["top_share"]) == pytest.approx(0.25)
    assert float(found.metrics["coverage"]) == pytest.approx(1)
    one = measured(Concentration(top=0.25), column(), causal=False)
    assert float(one.metrics["top_share"]) == 1
    assert float(one.metrics["coverage"]) == pytest.approx(1 / N)
    both = torch.cat([uniform(), column()], 1)
    layer = measured(Concentration(top=1 / N), both, causal=False).layers["token_top_share"]
    assert float(layer) == pytest.approx((1 + 1 / N) / 2)
    assert torch.equal(rescaled(torch.ones(4)), torch.ones(4))
    assert rescaled(torch.tensor([0.0, 1, 2]), 0.0, 1.0).tolist() == [0, 0.5, 1]


def test_drains() -> None:
    look = full_look()
    assert look.at is not None
    assert look.stream is not None
    look.at.v[:, :, 0] *= 1e-3
    look.at.k[:, :, 0] *= 1e3
    look.stream[:, 4] *= 1e3
    found = streamed(Drains(), look)
    assert float(found.metrics["value_first"].max()) < 0.01
    assert float(found.metrics["key_first"].min()) > 100
    assert float(found.layers["stream_peak"].min()) > 100
    norms = look.at.v[1, 1].norm(dim=-1)
    expected = norms[0] / norms[1:].sort().values[(N - 2) // 2]
    assert float(found.metrics["value_first"][1, 3]) == pytest.approx(float(expected))
    with pytest.raises(UnsupportedError, match="drains"):
        Drains().begin(plain_look(uniform()))


def test_contributions_share_a_layer() -> None:
    look = full_look()
    assert look.output is not None
    look.output[:, 2] = 0.0
    found = streamed(Contribution(), look).metrics
    assert torch.allclose(found["output_share"].sum(-1), torch.ones(2, dtype=torch.float64))
    assert (found["output_share"][:, 2] == 0).all()
    assert torch.allclose(found["output_norm"], look.output.norm(dim=-1).mean(-1))
    with pytest.raises(UnsupportedError, match="contribution"):
        Contribution().begin(plain_look(uniform()))


@pytest.mark.parametrize("name", MORE)
def test_heads_permute_with_their_numbers(name: str) -> None:
    order = torch.tensor([2, 0, 3, 1])
    plain, mixed = streamed(MORE[name], full_look()), streamed(MORE[name], full_look(order))
    for values, others in ((plain.metrics, mixed.metrics), (plain.profiles, mixed.profiles)):
        for key, x in values.items():
            assert torch.allclose(others[key], x[:, order], rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("probe", [*MORE.values(), MutualInformation()])
@pytest.mark.parametrize("prefix", [0, 3])
def test_tiles_add_up_to_the_whole(probe: Reading, prefix: int) -> None:
    weights = torch.rand(2, 4, N, N, dtype=torch.float64).softmax(-1)
    look = replace(full_look(), prefix=prefix, grid=(3, (N - prefix) // 3))
    whole, parts = probe.begin(look), probe.begin(look)
    whole.add(tile(weights, causal=False))
    every = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    for start, stop in ((0, 2), (2, 7), (7, N)):
        for h in (0, 2):
            keys = torch.arange(N) if start == 2 else slice(0, N)
            part = weights[:, h : h + 2, start:stop]
            seen = every.expand(1, 1, stop - start, N)
            parts.add(Seen(slice(0, 2), slice(h, h + 2), slice(start, stop), keys, part, seen))
    found, expected = parts.found(), whole.found()
    for got, wanted in (
        (found.metrics, expected.metrics),
        (found.profiles, expected.profiles),
        (found.layers, expected.layers),
    ):
        for key, x in wanted.items():
            assert torch.allclose(got[key], x, rtol=0, atol=1e-12, equal_nan=True)


def padded(ids: Tensor, left: int, right: int) -> dict[str, Tensor]:
    mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    whole = torch.nn.functional.pad(ids, (left, right))
    return {"input_ids": whole, "attention_mask": mask, "position_ids": positions}


def test_padding_and_batches_change_nothing() -> None:
    """Alone, padded on either side, or beside another sequence: the same numbers."""
    first, second = prompt(30), prompt(24, seed=9)
    model, probes = tiny_decoder(), [n for n, c in probe_cards().items() if c.kind == "reading"]
    alone = [atlas(model, [{"input_ids": ids}], probes) for ids in (first, second)]
    for left, right in ((6, 0), (0, 6)):
        rows = [padded(first, 0, 0), padded(second, left, right)]
        batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        together = atlas(model, [batch], probes)
        for mine, other, both in zip(alone[0].rows, alone[1].rows, together.rows, strict=True):
            assert mine.metric == other.metric == both.metric
            values = [x.value for x in (mine, other) if x.n]
            expected = sum(values) / len(values) if values else math.nan
            assert both.value == pytest.approx(expected, abs=1e-6, nan_ok=True), mine.metric


def test_a_gap_in_a_sequence() -> None:
    """Positions count real tokens: padding in the middle is no distance."""
    real = torch.ones(1, N, dtype=torch.bool)
    real[:, 4:7] = False
    positions = (real.cumsum(-1) - 1).clamp_min(0)
    weights = identity().roll(1, 2).tril(-1)  # the key before
    weights[..., 7, :] = identity()[..., 3, :]
    weights[..., 4:7, :] = 0.0
    look = Look(1, positions, positions, real, real)
    for probe, metric in ((Copying(), "previous_token"), (Distance(), "distance")):
        tally = probe.begin(look)
        tally.add(tile(weights))
        found = float(tally.found().metrics[metric])
        assert found == pytest.approx(1 if metric == "previous_token" else 8 / 9)


def test_the_band_of_entropies() -> None:
    """Uniform causal maps have a mean entropy of ln(T!)/T; inside the band nothing pulls."""
    seen = torch.ones(N, N, dtype=torch.float64).tril()
    maps = (seen / seen.sum(-1, keepdim=True)).expand(2, 3, 1, N, N).clone().requires_grad_()
    own = math.lgamma(N + 1) / N / math.log(N)
    near = entropy_penalty(maps, torch.tensor([own + 0.19]).double(), weight=1.0)
    (gradient,) = torch.autograd.grad(near, maps)
    assert near.item() == 0
    assert not gradient.any()
    far = entropy_penalty(maps, torch.tensor([[own + 0.3]] * 2).double(), weight=1.0)
    assert far.item() == pytest.approx((0.3 * math.log(N)) ** 2, rel=1e-6)
    with pytest.raises(ArgumentError):
        entropy_penalty(maps, torch.ones(3))


def test_map_divergence() -> None:
    scores = torch.randn(2, 3, 5, 5)
    shifted = scores + torch.randn(2, 3, 5, 1)
    assert float(map_divergence(shifted, scores)) == pytest.approx(0, abs=1e-6)
    assert float(map_divergence(scores.flip(-1), scores)) > 0
    with pytest.raises(ArgumentError):
        map_divergence(scores[:, :2], scores)


def test_bins_and_depth() -> None:
    values = [[4.0, 3.0], [2.5, 1.5], [0.9, 0.0]]
    rows = [
        Row("model", layer, head, "entropy", x, 1)
        for layer, heads in enumerate(values)
        for head, x in enumerate(heads)
    ]
    found = Atlas("model", tuple(rows))
    bins = entropy_bins(found)
    assert bins.shares == pytest.approx((2 / 6, 1 / 6, 1 / 6, 2 / 6))
    assert (bins.collapsed, bins.overloaded) == pytest.approx((1 / 3, 1 / 3))
    depth = by_depth(found, "entropy")
    assert depth[:, 0].tolist() == pytest.approx([3.5, 2.0, 0.45])
    assert depth[:, 1].tolist() == pytest.approx([0.5, 0.5, 0.45])
    with pytest.raises(UnknownNameError):
        entropy_bins(Atlas("model", (Row("model", 0, 0, "distance", 1.0, 1),)))


def test_readings_of_an_image_model_take_its_grid() -> None:
    ids = prompt(12)
    passage = Passage({"input_ids": ids}, grid=(3, 3), prefix=3)
    found = atlas(tiny_decoder(), [passage], ["rings", "mutual_information"])
    assert float(found.map("grid_distance").min()) >= 0
    assert found.profiles[f"{found.towers[0]}/rings"].shape[-1] == 16
