"""Cross-attention against saliency, on tiny models of speech and of text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import ids, t5, whisper
from torch import Tensor

from regard.atlases.survey import atlas
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.passage import Passage
from regard.core.scene import Scene
from regard.lenses.agreement import pearson
from regard.lenses.forced_decoding import Spoken
from regard.probes.cross_saliency import CrossSaliency, Maps, compared
from regard.testing.tiny import prompt, tiny_decoder

pytest.importorskip("transformers")
PROBE = CrossSaliency(masks=24)


def run(model: Any, inputs: dict[str, Tensor], probe: CrossSaliency = PROBE) -> list[Tensor]:
    """Numbers (B,H) of every layer."""
    passage = Passage(inputs, inputs["decoder_input_ids"])
    found: dict[str, list[Tensor]] = {}
    for _, site, finding in probe.run(Scene.of(model, [passage])):
        found.setdefault(site.name, []).append(finding.metrics["cross_saliency"])
    return [torch.cat(rows) for rows in found.values()]


def eager_maps(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The library's own cross-attention (L,H,I,T') of one sequence."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).cross_attentions
    model.set_attn_implementation(before)
    return torch.cat(maps)


@pytest.mark.parametrize("hide", ["input", "encoded"])
@pytest.mark.parametrize("build", [whisper, t5])
def test_heads_against_the_library_s_own_maps(build: Any, hide: Any) -> None:
    model, inputs = build()
    probe = CrossSaliency(hide=hide, masks=24)
    got = torch.cat(run(model, inputs, probe))
    spoken = Spoken.of(Passage(inputs, inputs["decoder_input_ids"]), 0, model.config)
    maps = eager_maps(model, inputs)
    with torch.no_grad():
        heat = probe.saliency(model, spoken, maps.shape[-1])
    assert heat.shape == maps.shape[-2:]
    assert torch.allclose(got, pearson(maps.double(), heat.double()), rtol=0, atol=1e-5)
    assert float(got.abs().max()) <= 1
    assert float(got.std()) > 0


def test_layers_mean_their_heads() -> None:
    model, inputs = whisper()
    passage = Passage(inputs, inputs["decoder_input_ids"])
    layers = [finding.layers for _, _, finding in PROBE.run(Scene.of(model, [passage]))]
    first, second = layers
    assert torch.equal(first["cross_saliency_layer"], first["cross_saliency_up_to"])
    spoken, maps = Spoken.of(passage, 0, model.config), eager_maps(model, inputs).double()
    with torch.no_grad():
        heat = PROBE.saliency(model, spoken, maps.shape[-1]).double()
    every = pearson(maps.mean((0, 1)), heat)
    assert torch.allclose(second["cross_saliency_up_to"][0], every, rtol=0, atol=1e-5)


def test_agreement_by_hand() -> None:
    """A head that is saliency itself, its opposite, one that looks at all alike; their mean."""
    site = next(site for site in Scene.of(t5()[0], []).sites if site.cross)
    heat = torch.rand(5, 7)
    heads = torch.stack([heat, 1 - heat, torch.full_like(heat, 0.5), heat]).double()
    (_, finding), *_ = compared(Maps({site.name: heads}), [site], heat)
    assert finding.metrics["cross_saliency"][0].tolist() == pytest.approx([1, -1, 0, 1])
    assert float(finding.layers["cross_saliency_layer"]) == pytest.approx(1)


def test_padding_and_batches_do_not_count() -> None:
    model, _ = t5()
    source, said = ids(14), ids(9)
    padded = torch.cat([source, torch.zeros(1, 6, dtype=torch.long)], 1)
    text = torch.cat([said, torch.zeros(1, 3, dtype=torch.long)], 1)
    other, more = ids(20), ids(12)
    batch = {
        "input_ids": torch.cat([padded, other]),
        "attention_mask": (torch.arange(20) < torch.tensor([[14], [20]])).long(),
        "decoder_input_ids": torch.cat([text, more]),
        "decoder_attention_mask": (torch.arange(12) < torch.tensor([[9], [12]])).long(),
    }
    together = run(model, batch)
    for row, (x, y) in enumerate(((source, said), (other, more))):
        alone = run(model, {"input_ids": x, "decoder_input_ids": y})
        for mine, theirs in zip(together, alone, strict=True):
            assert torch.allclose(mine[row], theirs[0], rtol=0, atol=1e-6)


def test_needs() -> None:
    with pytest.raises(ArgumentError):
        CrossSaliency(masks=0)
    with pytest.raises(UnsupportedError, match="cross-attention"):
        list(PROBE.run(Scene.of(tiny_decoder(), [Passage({"input_ids": prompt(8)})])))
    found = atlas(tiny_decoder(), [{"input_ids": prompt(8)}], ("entropy", "cross_saliency"))
    assert "cross-attention" in found.notes["cross_saliency"]
