"""Probes of models that see and read: image heads and vision-aware heads, by known answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import llava, pixels
from torch import Tensor

from regard.atlases.survey import atlas
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.observe import Seen
from regard.core.passage import Passage
from regard.core.probe import Finding, Look, measured, plain_look
from regard.core.scene import Scene
from regard.core.shown import tile
from regard.importance.head_divergence import above_median, divergence, loud
from regard.importance.image_sinks import given_back
from regard.probes.image_heads import ImageHeads
from regard.probes.vision_divergence import VisionDivergence
from regard.testing.tiny import prompt, tiny_decoder

N, WIDTH = 12, 16
IMAGE = range(2, 7)
SINK = 4
"""A token of the image that is massive where the first one is."""


def look(weights: Tensor) -> Look:
    """An image at 2 to 6; the tokens 0 and 4 are sinks."""
    batch = len(weights)
    stream = torch.ones(batch, N, WIDTH)
    stream[:, [0, SINK], 3] = 50.0
    stream[:, 1, 5] = 50.0  # massive elsewhere: no sink
    image = torch.zeros(batch, N, dtype=torch.bool)
    image[:, list(IMAGE)] = True
    return replace(plain_look(weights), roles={"image": image}, stream=stream)


def one_hot(*shares: tuple[int, float], rest: int = 0) -> Tensor:
    """Every query gives these keys these shares, and the rest to one key, (N,N)."""
    row = torch.zeros(N, dtype=torch.float64)
    for key, share in shares:
        row[key] += share
    row[rest] += 1 - sum(share for _, share in shares)
    return row.expand(N, N)


def found(weights: Tensor, probe: ImageHeads) -> Finding:
    tally = probe.begin(look(weights))
    tally.add(tile(weights, causal=False))
    return tally.found()


PROBE = ImageHeads(tau=3.0)


def test_image_heads_by_hand() -> None:
    heads = torch.stack(
        [
            one_hot((SINK, 0.5), (3, 0.25)),  # looks at the image, mostly at its sink
            one_hot((SINK, 0.1), (3, 0.7)),  # beside it
            one_hot((3, 0.1)),  # at the first token
        ]
    )[None]
    result = found(heads, PROBE)
    assert torch.allclose(result.metrics["image_mass"], torch.tensor([[0.75, 0.8, 0.1]]).double())
    clear = result.metrics["image_clear"][0]
    assert torch.allclose(clear[:2], torch.tensor([1 / 3, 7 / 8]).double())
    assert bool(clear[2].isnan())
    assert result.metrics["image_centric"].tolist() == [[0.0, 1.0, 0.0]]
    sinks = torch.tensor([[0.75, 0.3, 0.9]]).double()
    assert torch.allclose(result.metrics["image_sink_mass"], sinks)
    assert {name: x.tolist() for name, x in result.layers.items()} == {
        "image_sinks": [1.0],
        "text_sinks": [1.0],
    }
    told = found(heads, replace(PROBE, dims=(5,)))
    assert told.layers["image_sinks"].tolist() == [0.0]
    assert bool((told.metrics["image_clear"][0, :2] == 1).all())


def test_image_heads_tiles_and_order() -> None:
    weights = torch.rand(2, 4, N, N, dtype=torch.float64).softmax(-1)
    whole = found(weights, PROBE)
    order = torch.tensor([2, 0, 3, 1])
    tally = PROBE.begin(look(weights))
    for start in (0, 5, 10):
        for keys in (slice(0, 8), torch.arange(8, N)):
            rows = slice(start, min(start + 5, N))
            part = weights[:, :, rows][..., keys]
            every = torch.ones(1, 1, *part.shape[2:], dtype=torch.bool)
            tally.add(Seen(slice(0, 2), slice(0, 4), rows, keys, part, every))
    mixed = found(weights[:, order], PROBE)
    for name, values in whole.metrics.items():
        assert torch.allclose(tally.found().metrics[name], values, rtol=0, atol=1e-12)
        assert torch.equal(mixed.metrics[name], values[:, order])


def test_image_heads_needs() -> None:
    weights = torch.rand(1, 2, N, N).softmax(-1)
    with pytest.raises(UnsupportedError, match="image"):
        measured(ImageHeads(), weights)
    with pytest.raises(UnsupportedError, match="stream"):
        ImageHeads().begin(replace(look(weights), stream=None))
    with pytest.raises(ArgumentError, match="dims"):
        found(weights, ImageHeads(dims=(WIDTH,)))
    with pytest.raises(ArgumentError):
        ImageHeads(rho=1.5)
    whole = look(weights)
    last = torch.zeros(1, N, dtype=torch.bool)
    last[:, -1] = True
    tally = ImageHeads().begin(replace(whole, roles={"image": last}))
    tally.add(tile(weights))
    assert bool(tally.found().metrics["image_mass"].isnan().all())


def test_weight_is_moved_not_made() -> None:
    weights = torch.rand(1, 2, N, N, dtype=torch.float64).softmax(-1)
    seen = look(weights)
    sinks = torch.zeros(1, N, dtype=torch.bool)
    sinks[:, [0, SINK]] = True
    rows = torch.zeros(1, 2, N, dtype=torch.bool)
    rows[:, 1, 8:] = True
    moved = given_back(weights, seen.roles["image"], sinks, rows, 0.6)
    assert torch.equal(moved[:, 0], weights[:, 0])
    assert torch.equal(moved[:, 1, :8], weights[:, 1, :8])
    assert torch.allclose(moved.sum(-1), torch.ones(()).double())
    clear = seen.roles["image"] & ~sinks
    gain = (moved / weights)[:, 1, 8:]
    assert torch.allclose(gain[..., sinks[0]], torch.tensor(0.6).double())
    assert bool((gain[..., clear[0]].std(-1) < 1e-12).all())
    assert torch.equal(given_back(weights, seen.roles["image"], sinks, rows, 1.0), weights)


def test_loud_heads_are_not_aware() -> None:
    without = torch.ones(8, 3)
    without[7] = 40.0
    outputs = without + torch.linspace(0.1, 0.7, 8)[:, None]
    outputs[7] += 30.0
    moved = divergence(outputs, without)
    assert loud(moved, without).tolist() == [False] * 7 + [True]
    kept, aware = VisionDivergence().aware(moved, without)
    assert float(kept[7]) == 0
    assert aware.tolist() == [False] * 3 + [True] * 4 + [False]
    assert not bool(VisionDivergence().found(outputs, outputs).metrics["vision_divergence"].any())
    assert not bool(loud(moved[:1], without[:1]).any())
    odd = torch.tensor([1.0, 3.0, 2.0, 4.0])
    assert above_median(odd).tolist() == above_median(odd, midpoint=True).tolist()


@pytest.fixture(scope="module")
def seeing() -> Any:
    """A vision–language model in float64."""
    torch.manual_seed(0)
    return llava()[0].double()


def passage(*texts: Tensor, images: Tensor) -> Passage:
    """Images with texts of any length after them, padded on the left."""
    length = max(len(text) for text in texts)
    rows = [torch.cat([torch.full((length - len(x),), 0), torch.full((16,), 3), x]) for x in texts]
    ids = torch.stack(rows)
    mask = torch.stack([(torch.arange(16 + length) >= length - len(x)).long() for x in texts])
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": images}
    return Passage(inputs, ids, roles={"image": ids == 3})


def run(model: Any, *passages: Passage) -> list[dict[str, Tensor]]:
    scene = Scene.of(model, passages)
    return [
        {**finding.metrics, **finding.layers} for _, _, finding in VisionDivergence().run(scene)
    ]


def test_vision_divergence_is_what_the_projections_see(seeing: Any) -> None:
    """Against the outputs of heads taken before the projection by hooks, with and without."""
    text = torch.randint(5, 64, (9,))
    one = passage(text, images=pixels().double())
    seen: list[Tensor] = []
    layers = seeing.model.language_model.layers
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        for layer in layers
    ]
    with torch.no_grad():
        seeing(**one.inputs)
        seeing(input_ids=text[None])
    for hook in hooks:
        hook.remove()
    full, alone = (
        torch.stack([x[0, -1].view(4, -1) for x in part]) for part in (seen[:2], seen[2:])
    )
    expected = (full - alone).norm(dim=-1)
    got = torch.cat([finding["vision_divergence"] for finding in run(seeing, one)])
    assert torch.allclose(got, expected, rtol=0, atol=1e-9)
    assert float(expected.min()) > 0


def test_vision_divergence_of_a_batch_and_alone(seeing: Any) -> None:
    texts, images = [torch.randint(5, 64, (n,)) for n in (9, 4)], torch.randn(2, 3, 32, 32).double()
    together = run(seeing, passage(*texts, images=images))
    alone = [run(seeing, passage(t, images=images[i : i + 1])) for i, t in enumerate(texts)]
    for layer, finding in enumerate(together):
        for name, values in finding.items():
            expected = torch.cat([rows[layer][name] for rows in alone])
            assert torch.allclose(values.double(), expected.double(), rtol=0, atol=1e-6), name


def test_both_in_an_atlas(seeing: Any) -> None:
    texts, images = [torch.randint(5, 64, (n,)) for n in (9, 4)], torch.randn(2, 3, 32, 32).double()
    probes = (ImageHeads(tau=1.5), "vision_divergence")
    found = atlas(seeing, [passage(*texts, images=images)], probes)
    tower = "model.language_model.layers.*.self_attn"
    assert found.map("vision_divergence", tower).shape == (2, 4)
    assert float(found.map("image_mass", tower).min()) > 0
    alone = [passage(t, images=images[i : i + 1]) for i, t in enumerate(texts)]
    again = atlas(seeing, alone, probes)
    for row, other in zip(found.rows, again.rows, strict=True):
        assert row.value == pytest.approx(other.value, abs=1e-6, nan_ok=True), row.metric


def test_text_models_leave_a_note() -> None:
    found = atlas(
        tiny_decoder(), [{"input_ids": prompt(12)}], ("entropy", "image_heads", "vision_divergence")
    )
    assert set(found.metrics) == {"entropy", "entropy_share", "support", "column_share"}
    assert len(found.notes) == 2
    assert all("image" in reason for reason in found.notes.values())
