"""Probes by known answers, and the atlas of small models."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import regard
from regard.atlases.record import Atlas
from regard.atlases.survey import atlas
from regard.cli.main import app
from regard.core.catalog import probe_cards
from regard.core.errors import ArgumentError, UnknownNameError, UnsupportedError
from regard.core.observe import Seen
from regard.core.passage import Passage
from regard.core.probe import Finding, Look, Reading, measured, plain_look
from regard.core.shown import tile
from regard.probes.copying import Copying
from regard.probes.distance import Distance
from regard.probes.entropy import Entropy
from regard.probes.sinks import Sinks
from regard.tasks.induction import Induction
from regard.testing.tiny import prompt, tiny_decoder, tiny_encoder

N = 16
ELSEWHERE = {"drains", "contribution", "rings"}
"""Readings that ask for more than weights, tokens and streams: tests/test_readings.py has them."""
READINGS = [
    name for name, card in probe_cards().items() if card.kind == "reading" and name not in ELSEWHERE
]


def uniform(n: int = N) -> Tensor:
    """Causal and uniform: (1,1,n,n)."""
    seen = torch.ones(n, n).tril()
    return (seen / seen.sum(-1, keepdim=True))[None, None]


def shifted(by: int, n: int = N) -> Tensor:
    """Every query reads the key `by` before it, the first ones the first key."""
    keys = (torch.arange(n) - by).clamp_min(0)
    return torch.nn.functional.one_hot(keys, n).float()[None, None]


def number(probe: Reading, weights: Tensor, metric: str, tokens: Tensor | None = None) -> float:
    return float(measured(probe, weights, tokens).metrics[metric])


def test_uniform_attention() -> None:
    harmonic = sum(1 / i for i in range(1, N + 1))
    assert number(Sinks(), uniform(), "sink_first") == pytest.approx(harmonic / N)
    assert number(Entropy(), uniform(), "entropy") == pytest.approx(math.lgamma(N + 1) / N)
    assert number(Entropy(), uniform(), "entropy_share") == pytest.approx((N - 1) / N)
    assert number(Distance(), uniform(), "distance") == pytest.approx((N - 1) / 4)


def test_a_head_on_the_first_token() -> None:
    first = shifted(N)
    assert number(Sinks(), first, "sink_first") == 1
    assert number(Sinks(), first, "sink_count") == 1
    assert number(Entropy(), first, "entropy") == 0
    assert number(Distance(), first, "distance") == pytest.approx((N - 1) / 2)


def test_a_glance_of_the_last_queries_is_no_sink() -> None:
    itself = shifted(0)
    assert number(Sinks(threshold=0.1), itself, "sink_count") == _keys_above(itself, 0.1, 8)
    assert number(Sinks(threshold=0.1, viewers=1), itself, "sink_count") > 1


def _keys_above(weights: Tensor, threshold: float, viewers: int) -> int:
    received = weights[0, 0].sum(0) / torch.arange(N, 0, -1)
    return int(((received > threshold) & (torch.arange(N, 0, -1) >= viewers)).sum())


def test_a_previous_token_head() -> None:
    assert number(Copying(), shifted(1), "previous_token") == 1
    assert number(Copying(), shifted(2), "previous_token") == pytest.approx(1 / (N - 1))
    assert number(Distance(near=0), shifted(1), "local") == pytest.approx(1 / N)


def test_induction_and_duplicate_heads() -> None:
    """A segment of eight tokens twice: its second reading looks back by eight, or by seven."""
    tokens = torch.arange(8).repeat(2)[None]
    assert number(Copying(), shifted(8), "duplicate_token", tokens) == 1
    assert number(Copying(), shifted(8), "induction", tokens) == 0
    assert number(Copying(), shifted(7), "induction", tokens) == 1
    assert math.isnan(number(Copying(), uniform(), "induction", torch.arange(N)[None]))


def image_of(tokens: Tensor) -> Tensor:
    """A stretch of every sequence (B,N) that is taken for an image."""
    place = torch.arange(tokens.shape[1])
    return ((place >= 2) & (place < 6)).expand(tokens.shape)


def full_look(weights: Tensor, tokens: Tensor, stream: Tensor | None = None) -> Look:
    """All that a reading may ask of a call; stream (B,N,C): random numbers, unless it is given."""
    if stream is None:
        source = torch.Generator().manual_seed(0)
        stream = torch.randn(*tokens.shape, 8, generator=source, dtype=torch.float64)
    look = plain_look(weights, tokens)
    return replace(look, roles={"image": image_of(tokens)}, stream=stream)


def of_matrices(
    probe: Reading, weights: Tensor, tokens: Tensor, stream: Tensor | None = None
) -> Finding:
    """A reading's numbers for whole causal matrices (B,H,N,N)."""
    tally = probe.begin(full_look(weights, tokens, stream))
    tally.add(tile(weights))
    return tally.found()


@pytest.mark.parametrize("name", READINGS)
def test_heads_permute_with_their_numbers(name: str) -> None:
    weights = torch.rand(2, 4, N, N, dtype=torch.float64).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    tokens = torch.randint(0, 4, (2, N))
    order = torch.tensor([2, 0, 3, 1])
    probe = probe_cards()[name].build()
    plain, mixed = (of_matrices(probe, w, tokens) for w in (weights, weights[:, order]))
    for key, values in plain.metrics.items():
        assert torch.equal(mixed.metrics[key], values[:, order])
    for key, values in plain.profiles.items():
        assert torch.equal(mixed.profiles[key], values[:, order])


@pytest.mark.parametrize("name", READINGS)
def test_tiles_add_up_to_the_whole(name: str) -> None:
    weights = torch.rand(2, 4, N, N, dtype=torch.float64).tril()
    tokens = torch.randint(0, 4, (2, N))
    probe = probe_cards()[name].build()
    tally = probe.begin(full_look(weights, tokens))
    for start in (0, 6, 12):
        for h in (0, 2):
            rows, heads = slice(start, min(start + 6, N)), slice(h, h + 2)
            keys = torch.arange(rows.stop) if start == 6 else slice(0, rows.stop)
            part = weights[:, heads, rows, : rows.stop]
            seen = torch.ones(N, N, dtype=torch.bool).tril()[None, None, rows, : rows.stop]
            tally.add(Seen(slice(0, 2), heads, rows, keys, part, seen))
    whole, found = of_matrices(probe, weights, tokens), tally.found()
    assert set(found.metrics) <= set(probe_cards()[name].metrics)
    for key, values in whole.metrics.items():
        assert torch.allclose(found.metrics[key], values, rtol=0, atol=1e-12, equal_nan=True)


@pytest.fixture(scope="module")
def small() -> Atlas:
    ids = prompt(40, batch=2)
    return atlas(tiny_decoder(), [Passage({"input_ids": ids}, ids, roles={"image": image_of(ids)})])


def dense_metrics(model: Any, ids: Tensor, probe: Reading) -> Tensor:
    """A probe on the weights the library itself returns, (layers, B, H) of its first metric."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        given = model(ids, output_attentions=True, output_hidden_states=True)
    found = [
        of_matrices(probe, weights, ids, stream)
        for weights, stream in zip(given.attentions, given.hidden_states, strict=False)
    ]
    return torch.stack([next(iter(finding.metrics.values())) for finding in found])


@pytest.mark.parametrize("name", READINGS)
def test_streamed_as_from_whole_matrices(name: str, small: Atlas) -> None:
    probe = probe_cards()[name].build()
    metric = next(iter(probe_cards()[name].metrics))
    expected = dense_metrics(tiny_decoder(), prompt(40, batch=2), probe).mean(1)
    assert torch.allclose(small.map(metric).double(), expected, rtol=0, atol=1e-6)


def test_padding_does_not_count() -> None:
    ids = prompt(30)
    padded = torch.cat([torch.zeros(1, 10, dtype=torch.long), ids], 1)
    mask = (torch.arange(40) >= 10).long()[None]
    alone = atlas(tiny_decoder(), [{"input_ids": ids}])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    batch = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
    together = atlas(tiny_decoder(), [batch])
    for mine, theirs in zip(alone.rows, together.rows, strict=True):
        assert mine.metric == theirs.metric
        assert mine.value == pytest.approx(theirs.value, abs=1e-6, nan_ok=True)


def test_encoders_too() -> None:
    found = atlas(tiny_encoder(), [{"input_ids": prompt(20)}])
    assert found.map("distance").shape == (3, 4)
    assert float(found.map("entropy_share").min()) > 0


def test_saving_and_loading(small: Atlas, tmp_path: Path) -> None:
    small.save(tmp_path / "atlas")
    again = Atlas.load(tmp_path / "atlas")
    assert again.rows == small.rows
    assert all(torch.equal(again.profiles[k], v) for k, v in small.profiles.items())
    assert sorted(p.name for p in (tmp_path / "atlas").iterdir()) == [
        "atlas.json",
        "profiles.safetensors",
    ]
    with pytest.raises(ArgumentError, match="atlas"):
        Atlas.load(tmp_path)


def test_selecting_and_comparing(small: Atlas) -> None:
    values = small.map("entropy")
    best = small.select("entropy", top=1)[0]
    assert values[best] == values.max()
    assert len(small.select("entropy", top=0.5)) == 6
    assert small.select("entropy", top=1, lowest=True)[0] != best
    rows = small.compare(atlas(tiny_decoder(seed=3), [{"input_ids": prompt(40)}]))
    assert any(row["difference"] for row in rows)
    with pytest.raises(UnknownNameError):
        small.select("entropie", top=1)
    with pytest.raises(ArgumentError):
        small.select("entropy", top=0.0)


def test_no_batches() -> None:
    with pytest.raises(ArgumentError, match="passages"):
        atlas(tiny_decoder(), [])


def test_the_pocket_model_has_its_induction_heads() -> None:
    """Layer 1 retrieves; without looking at previous tokens below it could not."""
    model = regard.pocket.language()[0]
    task = Induction(length=256, examples=8)
    batches = [{"input_ids": batch.inputs} for batch in task.batches("test", 8)]
    found = atlas(model, batches)
    assert {layer for layer, _ in found.select("induction", top=4)} == {1}
    assert float(found.map("induction").max()) > 0.3
    assert found._repr_html_().count("<tr>") == 17


def test_the_verb(tmp_path: Path) -> None:
    out = tmp_path / "atlas"
    run = CliRunner().invoke(
        app, ["atlas", "--length", "128", "--examples", "2", "--out", str(out)]
    )
    assert run.exit_code == 0, run.output
    assert "induction" in run.output
    assert Atlas.load(out).map("entropy").shape == (4, 4)
    assert all(row.n == 2 for row in Atlas.load(out).rows if row.metric == "entropy")


def test_the_verb_s_bad_input(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    for given in (["--length", "0"], ["--data", str(short)], ["nowhere/at-all"]):
        run = CliRunner().invoke(app, ["atlas", *given])
        assert run.exit_code == 2
        assert len(run.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("left", [True, False])
def test_examples_count_real_tokens(left: bool) -> None:
    """Spans of the strongest examples start where the keys' own numbers say, padded or not."""
    ids, gap = prompt(30), torch.zeros(1, 10, dtype=torch.long)
    padded = torch.cat([gap, ids] if left else [ids, gap], 1)
    mask = torch.cat([gap, gap.new_ones(1, 30)] if left else [gap.new_ones(1, 30), gap], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    batch = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
    alone = atlas(tiny_decoder(), [{"input_ids": ids}]).examples
    together = atlas(tiny_decoder(), [batch]).examples
    assert alone
    for mine, theirs in zip(alone, together, strict=True):
        assert (mine.query, mine.word) == (theirs.query, theirs.word)
        for own, other in zip(mine.spans, theirs.spans, strict=True):
            assert (own.start, own.words) == (other.start, other.words)
            assert own.weights == pytest.approx(other.weights, abs=2e-4)


NEED_IMAGES = ("image_heads", "rings")


@pytest.mark.parametrize("name", sorted(n for n, c in probe_cards().items() if c.kind == "reading"))
def test_company_and_kernel_do_not_matter(name: str) -> None:
    """Two sequences side by side, one of them padded, give what each gives alone, whichever kernel
    the model itself runs.
    """
    long, short = prompt(40), prompt(25, seed=3)
    padded = torch.cat([torch.zeros(1, 15, dtype=torch.long), short], 1)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :15] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    pair = {"input_ids": torch.cat([long, padded]), "attention_mask": mask}
    eager = tiny_decoder()
    eager.set_attn_implementation("eager")
    passages = [pair | {"position_ids": positions}], [{"input_ids": long}, {"input_ids": short}]
    try:
        together, apart, other = (
            atlas(model, given, [name], examples=0)
            for model, given in (
                (tiny_decoder(), passages[0]),
                (tiny_decoder(), passages[1]),
                (eager, passages[1]),
            )
        )
    except UnsupportedError:
        if name not in NEED_IMAGES:
            raise
        return
    for rows in zip(together.rows, apart.rows, other.rows, strict=True):
        first, *rest = rows
        for row in rest:
            assert (row.layer, row.head, row.metric, row.n) == (
                first.layer, first.head, first.metric, first.n,
            )  # fmt: skip
            assert row.value == pytest.approx(first.value, abs=1e-5, rel=1e-5, nan_ok=True)
