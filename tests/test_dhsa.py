"""Chunks, their boundaries, and the predictor that learns them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.importance.boundaries import boundary_ratio, pick_gaps, soft_labels
from regard.importance.boundary_predictor import (
    BoundaryPredictor,
    save_predictor,
    saved_predictor,
)
from regard.importance.chunk_choice import ChunkChoice
from regard.importance.chunks import chunk_numbers, no_chunks
from regard.importance.query_blocks import query_blocks
from regard.plan import Plan, Step
from regard.recipes.dhsa_boundaries import layer_loss, train_predictor
from regard.testing.tiny import prompt, tiny_decoder
from regard.treatments.dhsa import Dhsa


def blockwise(length: int, edge: int) -> Tensor:
    """Attention (1,L,L) that looks at either side of an edge, never across."""
    side = torch.arange(length) < edge
    same = (side[:, None] == side) & torch.ones(length, length).tril().bool()
    return (same / same.sum(-1, keepdim=True))[None]


def test_the_ratio_peaks_where_attention_stops() -> None:
    ratio = boundary_ratio(blockwise(40, 17), window=4)[0]
    assert int(ratio.argmax()) == 16, "the gap after token 16"
    assert pick_gaps(ratio, 1e3, 5, 8) == [16]
    assert (ratio[:3] == 0).all()
    assert (ratio[-4:] == 0).all()


def test_gaps_keep_their_distance() -> None:
    scores = torch.tensor([0.0, 5, 6, 5, 0, 4, 0, 3])
    assert pick_gaps(scores, 0.5, 8, 1) == [2, 5, 7]
    assert pick_gaps(scores, 0.5, 2, 1) == [2, 5]
    assert pick_gaps(scores, 0.5, 8, 3) == [2, 7]
    assert pick_gaps(scores, 9.0, 8, 0) == []


def test_labels_turn_at_their_ratio() -> None:
    torch.testing.assert_close(soft_labels(torch.tensor([2.0]), 4.0, 2.0), torch.tensor([0.5]))


def test_chunks_go_on_after_the_last_start() -> None:
    starts, positions = torch.tensor([[0, 3, 7]]), torch.arange(14)[None]
    expected = [1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5]
    assert chunk_numbers(starts, positions, 3).tolist() == [expected]


def test_sums_may_be_added_to() -> None:
    keys, positions = torch.randn(2, 11, 4), torch.arange(11).expand(2, -1)
    numbers = chunk_numbers(torch.zeros(2, 1, dtype=torch.long), positions, 3)
    real = torch.ones_like(numbers, dtype=torch.bool)
    whole = no_chunks(keys).plus(keys, numbers, real)
    parts = no_chunks(keys).plus(keys[:, :7], numbers[:, :7], real[:, :7])
    parts = parts.plus(keys[:, 7:], numbers[:, 7:], real[:, 7:])
    torch.testing.assert_close(parts.sums, whole.sums)
    assert torch.equal(parts.sizes, whole.sizes)


def test_a_long_chunk_of_equal_keys_counts_by_the_root_of_its_length() -> None:
    keys = torch.ones(1, 6, 4)
    numbers = torch.tensor([[0, 0, 1, 1, 1, 1]])
    chunks = no_chunks(keys).plus(keys, numbers, torch.ones(1, 6, dtype=torch.bool))
    blocks = query_blocks(torch.tensor([[5]]), None, 1)
    scores = ChunkChoice(4, 1, 0).scores(keys[:, None, :1], blocks, chunks, numbers)[0, 0]
    torch.testing.assert_close(scores[-1], scores[0] * 2**0.5)


def test_chunks_and_blocks_of_one_choose_the_best_keys() -> None:
    q, k = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    place, blocks = torch.arange(9)[None], query_blocks(torch.arange(9)[None], None, 1)
    real = torch.ones(1, 9, dtype=torch.bool)
    chunks = no_chunks(k.mean(1)).plus(k.mean(1), place, real)
    choice = ChunkChoice(3, 0, 0)
    allowed = torch.ones(1, 9, 9).tril().bool()
    read = choice.read(choice.scores(q, blocks, chunks, place), allowed)
    scores = (q.mean(1) @ k.mean(1).mT).masked_fill(~allowed, -torch.inf)
    best = torch.zeros_like(read).scatter_(2, scores.topk(3).indices, True) & allowed
    assert torch.equal(read, best)


def test_sinks_take_the_place_of_the_first_chosen() -> None:
    scores, allowed = torch.arange(10.0).view(1, 1, 10), torch.ones(1, 1, 10, dtype=torch.bool)
    read = ChunkChoice(5, 2, 2).read(scores, allowed)[0, 0]
    assert read.nonzero()[:, 0].tolist() == [0, 1, 7, 8, 9]


def test_a_predictor_learns_an_edge_and_survives_saving(tmp_path: Path) -> None:
    torch.manual_seed(0)
    predictor = BoundaryPredictor(16, heads=2, hidden=16, learned_pool=True)
    keys = torch.randn(1, 2, 1, 8).repeat(1, 1, 40, 1)
    keys[:, :, 20:] *= -1
    ratio = boundary_ratio(blockwise(40, 20), 4)
    optimiser = torch.optim.Adam(predictor.parameters(), 3e-3)
    first = layer_loss(predictor, keys, ratio).item()
    for _ in range(60):
        optimiser.zero_grad()
        loss = layer_loss(predictor, keys, ratio)
        loss.backward()
        optimiser.step()
    assert loss.item() < first / 5
    with torch.no_grad():
        logits = predictor(keys)[0, 7:32]
    assert 16 <= int(logits.argmax()) + 7 <= 22
    save_predictor(predictor, str(tmp_path / "p.safetensors"))
    again = saved_predictor(str(tmp_path / "p.safetensors"))
    assert all(torch.equal(x, again.state_dict()[n]) for n, x in predictor.state_dict().items())


def test_the_recipe_trains_on_a_model_and_its_predictor_serves(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, predictor = tiny_decoder(), BoundaryPredictor(16, hidden=16)
    losses: list[float] = []
    batches = iter([prompt(40, batch=2)] * 8)
    train_predictor(
        predictor, model, batches, 8, rate=3e-3, watch=lambda done, loss: losses.append(loss)
    )
    assert losses[-1] < losses[0]
    path = str(tmp_path / "p.safetensors")
    save_predictor(predictor, path)
    options = {"tokens": 16, "local": 4, "sinks": 2, "block": 4, "chunk": 4, "instruction": 0}
    equal, learned = (
        Plan(steps=(Step(treatment="dhsa", options=options | extra),))
        for extra in ({}, {"predictor": path, "threshold": -1.0, "apart": 2})
    )
    ids = prompt(30)
    pads = torch.zeros(1, 7, dtype=torch.long)
    found = []
    with torch.no_grad():
        for plan in (equal, learned):
            with plan.applied(model):
                found.append(model(ids, use_cache=False).logits)
        mask = torch.cat([pads, torch.ones_like(ids)], 1)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with learned.applied(model):
            padded = model(
                torch.cat([pads, ids], 1),
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
            ).logits
    assert not torch.allclose(*found)
    torch.testing.assert_close(padded[:, 7:], found[1])


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 4, "local": 5},
        {"boundaries": (4, 3)},
        {"boundaries": (0, 3)},
        {"boundaries": (3,), "predictor": "x"},
        {"block": 0},
        {"instruction": -1},
    ],
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ArgumentError):
        Dhsa(**options)  # type: ignore[arg-type]


def test_keys_of_another_width_are_refused() -> None:
    with pytest.raises(ArgumentError, match="keys"):
        BoundaryPredictor(16)(torch.randn(1, 2, 5, 4))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = str(tmp_path / "other.safetensors")
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ArgumentError, match="predictor"):
        saved_predictor(path)
