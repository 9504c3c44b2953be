"""Experiments by known answers: what is lost without a head, what it adds, what it looks at."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import DECODERS, ENCODERS, GROUPED
from torch import Tensor, nn

from regard.atlases.survey import atlas
from regard.core.catalog import probe_cards
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.outputs import Noted
from regard.core.passage import Passage, passage_of
from regard.core.passing import passing
from regard.core.predictions import Predictions
from regard.core.scene import Scene
from regard.core.some_rows import spread_rows
from regard.probes.ablation import HOWS, Ablation
from regard.probes.gradient import Gradient
from regard.probes.influence import attention_influence
from regard.probes.layer_similarity import LayerSimilarity
from regard.probes.logit_lens import contributions, neuron_gaps
from regard.probes.map_similarity import MapSimilarity, maps_of
from regard.probes.vtrans import Gate, Vtrans
from regard.testing.compare import close
from regard.testing.tiny import prompt, tiny_decoder, tiny_encoder
from regard.treatments.head_gain import HeadGain

transformers = pytest.importorskip("transformers")
IMPORTANCE = (
    "ablation",
    "gradient",
    "influence",
    "amp",
    "logit_lens",
    "path_patching",
    "activation_patching",
    "arithmetic",
)
EXPERIMENTS = (*IMPORTANCE, "retrieval", "layer_similarity", "map_similarity")
"""Those that a decoder and passages with answers serve."""
HEAD = 2
"""The head that tests plant something in."""


def full_passage(ids: Tensor, mask: Tensor | None = None) -> Passage:
    """A passage with everything an experiment may ask for; its answer is what the model says."""
    mask = torch.ones_like(ids) if mask is None else mask
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    said = tiny_decoder().generate(**given, max_new_tokens=2, do_sample=False, pad_token_id=0)
    answer = said[:, ids.shape[1] :]
    needle = torch.zeros_like(mask).bool()
    needle[:, -5:-3] = True
    other = ids.flip(0) if len(ids) > 1 else (ids + 7) % 61
    return Passage(
        given,
        ids,
        roles={"needle": needle},
        answer=answer,
        wrong=(answer[:, 0] + 1) % 61,
        contrast={**given, "input_ids": other.masked_fill(mask == 0, 0)},
    )


def found(probe: Any, model: Any, *passages: Passage) -> dict[tuple[int, str], Tensor]:
    """By layer and metric, what an experiment finds in all passages, sequence after sequence."""
    parts: dict[tuple[int, str], list[Tensor]] = {}
    for _, site, finding in probe.run(Scene.of(model, passages)):
        for name, values in {**finding.metrics, **finding.layers}.items():
            parts.setdefault((site.layer, name), []).append(values)
    return {key: torch.cat(values) for key, values in parts.items()}


def built(name: str) -> Any:
    """An experiment with its defaults, ablation in every way."""
    return Ablation(HOWS) if name == "ablation" else probe_cards()[name].build()


def beside(long: Passage, short: Passage, side: str) -> Passage:
    """Two passages as one, the shorter padded on one side."""
    pad = long.tokens.shape[1] - short.tokens.shape[1]

    def both(a: Tensor, b: Tensor) -> Tensor:
        gap = b.new_zeros(len(b), pad)
        return torch.cat([a, torch.cat([gap, b] if side == "left" else [b, gap], 1)])

    def all_of(a: Any, b: Any) -> dict[str, Tensor]:
        return {key: both(a[key], b[key]) for key in a}

    return Passage(
        all_of(long.inputs, short.inputs),
        both(long.tokens, short.tokens),
        roles=all_of(long.roles, short.roles),
        answer=torch.cat([long.answer, short.answer]),
        wrong=torch.cat([long.wrong, short.wrong]),
        contrast=all_of(long.contrast, short.contrast),
    )


PADDED = [(name, side) for name in EXPERIMENTS for side in ("left", "right")]
PADDED.remove(("retrieval", "right"))  # a model cannot go on from padding: refused, see below


@pytest.mark.parametrize(("name", "side"), PADDED)
def test_batches_and_padding_do_not_matter(name: str, side: str) -> None:
    """Two unequal sequences together and one after the other."""
    card, model = probe_cards()[name], tiny_decoder()
    long, short = full_passage(prompt(14)), full_passage(prompt(9, seed=5))
    apart = found(built(name), model, long, short)
    together = found(built(name), model, beside(long, short, side))
    assert set(apart) == set(together)
    assert {metric for _, metric in apart} <= {*card.metrics, *card.layers}
    for key, values in apart.items():
        assert len(values) == 2
        assert values.isfinite().any(), key
        assert torch.allclose(values, together[key], rtol=1e-5, atol=1e-7, equal_nan=True), key


def without_output(model: Any, layer: int, head: int) -> None:
    """Make the output projection ignore a head."""
    with torch.no_grad():
        model.model.layers[layer].self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] = 0


@pytest.mark.parametrize("name", IMPORTANCE)
def test_a_head_whose_output_is_not_used_has_no_importance(name: str) -> None:
    model = tiny_decoder()
    without_output(model, 1, HEAD)
    passage = full_passage(prompt(12))
    values = found(
        Ablation(HOWS) if name == "ablation" else probe_cards()[name].build(), model, passage
    )
    for (layer, metric), x in values.items():
        if x.ndim == 2 and layer == 1:
            assert float(x[:, HEAD].abs().max()) < 1e-6, metric
            assert x.abs().sum() > 1e-6, metric


def predictions(*chances: tuple[float, ...], target: int = 0) -> Predictions:
    logs = torch.tensor([chances]).double().log()
    targets = torch.full(logs.shape[:2], target)
    return Predictions(logs, targets, torch.ones_like(targets, dtype=torch.bool))


def test_divergences_of_known_predictions() -> None:
    sure, other = predictions((1 - 1e-12, 1e-12)), predictions((1e-12, 1 - 1e-12))
    even = predictions((0.5, 0.5))
    assert float(sure.jsd(other)) == pytest.approx(math.log(2), abs=1e-6)
    assert float(sure.jsd(sure)) == 0
    assert float(sure.kl(even)) == pytest.approx(math.log(2), abs=1e-9)
    assert float(even.losses()) == pytest.approx(math.log(2))
    assert float(even.chances()) == pytest.approx(0.5)
    nothing = replace(even, counted=torch.zeros(1, 1, dtype=torch.bool))
    assert nothing.losses().isnan().all()


def test_divergences_stay_in_their_bounds() -> None:
    values = found(Ablation(HOWS), tiny_decoder(), full_passage(prompt(12, batch=3)))
    for (_, metric), x in values.items():
        if metric.startswith("jsd"):
            assert 0 <= float(x.min()) <= float(x.max()) <= math.log(2)
        if metric.startswith("kl"):
            assert float(x.min()) >= 0


def test_a_head_of_constant_output_loses_nothing_to_its_mean() -> None:
    """Its values are its bias alone, wherever it looks; zero is another matter."""
    model = tiny_encoder()
    value = model.bert.encoder.layer[1].attention.self.value
    with torch.no_grad():
        value.weight[8 * HEAD : 8 * HEAD + 8] = 0
        value.bias.normal_()
    passage = passage_of({"input_ids": prompt(12, batch=2)})
    values = found(Ablation(HOWS), model, passage)
    for how in ("mean", "uniform"):
        for metric in ("cost", "kl", "jsd", "fall"):
            assert float(values[1, f"{metric}_of_{how}"][:, HEAD].abs().max()) < 1e-6
    assert values[1, "kl_of_zero"][:, HEAD].min() > 1e-4
    with pytest.raises(ArgumentError, match="how"):
        Ablation(("nothing",))  # type: ignore[arg-type]


def test_classes() -> None:
    """For a classifier: the fall of the true class's probability."""
    config = transformers.BertConfig(**{**GROUPED, "num_labels": 3, "initializer_range": 0.3})
    model = transformers.BertForSequenceClassification(config).double().eval()
    ids, labels = prompt(10, batch=2), torch.tensor([2, 0])
    passage = Passage({"input_ids": ids}, ids, labels=labels)
    scene = Scene.of(model, [passage])
    values = found(Ablation(), model, passage)
    with torch.no_grad():
        before = model(ids).logits.softmax(-1)
        with scene.treated(HeadGain(0.0), scene.sites[1], heads=[HEAD]):
            after = model(ids).logits.softmax(-1)
    fall = (before - after)[torch.arange(2), labels]
    close(values[1, "fall_of_zero"][:, HEAD], fall, "fall", 1e-12)
    gain = (before.log() - after.log())[torch.arange(2), labels]
    close(values[1, "cost_of_zero"][:, HEAD], gain, "cost", 1e-12)


class Classifier(nn.Module):
    """Plain PyTorch: one layer of attention over vectors, and three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[0](x).mean(1))


class Block(nn.Module):
    """Residual attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


class Attention(nn.Module):
    """Four heads of width 4."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        o = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(o.transpose(1, 2).flatten(2))


def test_a_plain_classifier() -> None:
    """No tokens, no cache, no padding: what needs none of them is measured."""
    model, x, labels = (
        Classifier().double(),
        torch.randn(3, 6, 16).double(),
        torch.tensor([0, 2, 1]),
    )
    made = atlas(model, [Passage({"x": x}, labels=labels)], [*IMPORTANCE, "layer_similarity"])
    wanted = {"cost_of_zero", "gradient", "influence", "contribution"}
    assert wanted <= set(made.metrics)
    assert "block_similarity" in made.layer_metrics
    missing = {"logit_lens", "path_patching", "activation_patching", "arithmetic"}
    assert set(made.notes) == {*missing, "layer_similarity"}
    with torch.no_grad():
        weight = model.blocks[0].attn.proj.weight
        weight[:, 4 * HEAD : 4 * HEAD + 4] = 0
    silent = atlas(model, [Passage({"x": x}, labels=labels)], ["amp", "gradient", "ablation"])
    for metric in ("contribution", "gradient", "cost_of_zero", "jsd_of_zero"):
        values = silent.map(metric)[0].abs()
        assert float(values[HEAD]) < 1e-7 < float(values.max())


def test_gradients_are_those_of_a_gain() -> None:
    model, passage = tiny_decoder(), full_passage(prompt(12, batch=2))
    scene, step = Scene.of(model, [passage]), 1e-2
    values = found(Gradient(), model, passage)

    def loss(gamma: float) -> Tensor:
        with torch.no_grad(), scene.treated(HeadGain(gamma), scene.sites[1], heads=[HEAD]):
            return Predictions.of(model(**passage.inputs), passage).losses()

    slope = (loss(1 + step) - loss(1 - step)) / (2 * step)
    close(values[1, "gradient"][:, HEAD], slope.abs(), "size", 1e-3)
    close(values[1, "gradient_cost"][:, HEAD], -slope, "cost", 1e-3)
    assert not any(x.grad is not None for x in model.parameters())


def test_no_head_no_influence() -> None:
    scene = Scene.of(tiny_decoder(), [full_passage(prompt(12, batch=2))])
    assert torch.equal(next(attention_influence(scene, [])), torch.zeros(2).double())
    one = next(attention_influence(scene, [(1, HEAD)]))
    close(
        one,
        found(probe_cards()["influence"].build(), scene.model, *scene.passages)[1, "influence"][
            :, HEAD
        ],
        "one head",
        1e-9,
    )
    with pytest.raises(ArgumentError, match="heads"):
        next(attention_influence(scene, [(9, 0)]))


def test_a_probe_is_asked_for_once() -> None:
    with pytest.raises(ArgumentError, match="each once"):
        atlas(tiny_decoder(), [{"input_ids": prompt(12)}], ["ablation", Ablation(("mean",))])


def test_domains_have_columns_of_their_own() -> None:
    passages = [replace(full_passage(prompt(12, seed=i)), domain=d) for i, d in enumerate("ab")]
    both = atlas(tiny_decoder(), passages, ["ablation"])
    alone = atlas(tiny_decoder(), passages[:1], ["ablation"])
    close(both.map("cost_of_zero@a"), alone.map("cost_of_zero"), "domain", 1e-6)
    mean = (both.map("cost_of_zero@a") + both.map("cost_of_zero@b")) / 2
    close(both.map("cost_of_zero"), mean, "mean of both", 1e-6)
    assert "cost_of_zero@a" not in alone.metrics


def test_what_is_missing_is_named_and_the_rest_is_kept() -> None:
    plain = [{"input_ids": prompt(12)}]
    made = atlas(tiny_decoder(), plain, "all")
    assert "answer" in made.notes["retrieval"]
    assert "contrast" in made.notes["path_patching"]
    assert "answer" in made.notes["logit_lens"]
    assert {"cost_of_zero", "contribution", "entropy"} <= set(made.metrics)
    assert atlas(tiny_encoder(), plain, "all").notes["retrieval"]


def test_similarity_of_layers() -> None:
    model, passage = tiny_decoder(), full_passage(prompt(12, batch=2))
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    values = found(LayerSimilarity(), model, passage)
    close(values[1, "attention_similarity"], torch.ones(2).double(), "idle attention", 1e-12)
    close(values[2, "mlp_similarity"], torch.ones(2).double(), "idle feed-forward", 1e-12)
    close(values[1, "mlp_similarity"], values[1, "block_similarity"], "the rest", 1e-12)
    assert (values[0, "block_similarity"] < 0.999).all()


def test_blocks_that_normalise_after_are_measured_whole() -> None:
    """Without a known stream between its parts."""
    made = atlas(tiny_encoder(), [{"input_ids": prompt(12)}], ["layer_similarity"], examples=0)
    assert made.layer_metrics == ["block_similarity"]
    assert "layer_similarity" in made.notes


def test_equal_layers_attend_alike() -> None:
    model, passage = tiny_decoder(), full_passage(prompt(12, batch=2))
    with torch.no_grad():
        first, second = (model.model.layers[i] for i in (0, 1))
        first.self_attn.o_proj.weight.zero_()
        first.mlp.down_proj.weight.zero_()
        for name in ("q_proj", "k_proj"):
            getattr(second.self_attn, name).weight.copy_(getattr(first.self_attn, name).weight)
    values = found(MapSimilarity(), model, passage)
    assert set(values) == {(1, "map_similarity"), (2, "map_similarity")}
    close(values[1, "map_similarity"], torch.ones(2, 4).double(), "alike", 1e-12)
    assert (values[2, "map_similarity"] < 0.999).all()


def test_maps_are_those_the_library_returns_on_rows_that_are_spread() -> None:
    model, ids = tiny_decoder(), prompt(12)
    some = maps_of(
        Scene.of(model, [passage_of({"input_ids": ids})]), passage_of({"input_ids": ids}), 3
    )
    model.set_attn_implementation("eager")
    whole = model(ids, output_attentions=True).attentions
    for mine, theirs in zip(some, whole, strict=True):
        close(mine, theirs[:, :, [3, 7, 11]], "rows", 1e-6)
    real = torch.tensor([[False] * 4 + [True] * 8, [True] * 2 + [False] * 10])
    rows, there = spread_rows(real, 4)
    assert rows[0].tolist() == [5, 7, 9, 11]
    assert rows[1, :2].tolist() == [0, 1]
    assert there.tolist() == [[True] * 4, [True, True, False, False]]
    with pytest.raises(ArgumentError, match="rows"):
        MapSimilarity(0)


WINDOWED = "Qwen2.5-VL"
"""Its vision tower cuts windows inside the attention module."""


@pytest.mark.parametrize("family", sorted({*DECODERS, *ENCODERS} - {WINDOWED}))
def test_the_output_projection_of_every_family(family: str) -> None:
    """It takes what the heads give, side by side."""
    model, inputs = {**DECODERS, **ENCODERS}[family]()
    scene = Scene.of(model, [Passage(inputs)])
    modules = {site.name: scene.host.projection(model, site) for site in scene.sites}
    for site in scene.sites:
        with passing({site.name: modules[site.name]}) as passed, torch.no_grad():
            model(**inputs)
            given = passed[site.name][0]
            rows = given.shape[:-1].numel() // len(given)
            noted = Noted(torch.ones(len(given), rows, dtype=torch.bool))
            with scene.treated(noted, site):
                model(**inputs)
        assert torch.allclose(
            noted.found[site.name].flatten(), given.reshape(-1), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("family", ["GPT-2", "Llama", "GPT-NeoX", "Gemma 3"])
def test_heads_add_up_to_what_attention_gives(family: str) -> None:
    model, inputs = DECODERS[family]()
    passage = passage_of(inputs)
    scene = Scene.of(model, [passage])
    where = torch.zeros_like(passage.tokens, dtype=torch.bool)
    where[:, -1] = True
    for site in scene.chain:
        projection = scene.host.projection(model, site)
        with torch.no_grad(), passing({site.name: projection}) as passed:
            model(**inputs)
        with torch.no_grad():
            each = contributions(scene, site, passed, where)
            given, attended = (x[:, -1] for x in passed[site.name])
            bias = projection(torch.zeros_like(given))
        close(each.sum(1) + bias, attended, site.name, 1e-5)


def test_a_head_that_names_the_answer() -> None:
    """Its output projection writes the answer's row of the unembedding."""
    model, passage = tiny_decoder(), full_passage(prompt(12))
    right = int(passage.answer[0, 0])
    with torch.no_grad():
        row = model.lm_head.weight[right]
        value = model.model.layers[2].self_attn
        value.o_proj.weight[:, 8 * HEAD] += 1e4 * row
        with passing({"o": value.o_proj}) as passed:
            model(**passage.inputs)
        sign = passed["o"][0][0, -1, 8 * HEAD].sign()
        value.o_proj.weight[:, 8 * HEAD] *= sign
    values = found(probe_cards()["logit_lens"].build(), model, passage)
    gaps = values[2, "head_gap"][0]
    norm, unembedding = model.model.norm, model.lm_head
    with torch.no_grad():
        alone = unembedding(norm(row))
    expected = alone[right] - alone[int(passage.wrong)]
    assert float(gaps[HEAD]) == pytest.approx(float(expected), rel=1e-2)
    assert int(values[2, "head_lens"][0].argmax()) == HEAD


def test_a_neuron_that_names_the_answer() -> None:
    model, passage = tiny_decoder(), full_passage(prompt(12, batch=2))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 17] *= 1e3
        scene = Scene.of(model, [passage])
        with passing({"down": model.model.layers[1].mlp.down_proj}) as passed:
            model(**passage.inputs)
        active = passed["down"][0][:, -1, 17]
        said = active[:, None] * model.model.layers[1].mlp.down_proj.weight[:, 17]
        logits = model.lm_head(model.model.norm(said))
    neurons, gaps = neuron_gaps(scene, passage, 1, top=3)
    assert neurons.shape == gaps.shape == (2, 3)
    assert neurons[:, 0].tolist() == [17, 17]
    rows = torch.arange(2)
    expected = logits[rows, passage.answer[:, 0]] - logits[rows, passage.wrong]
    close(gaps[:, 0], expected, "gap", 1e-9)


def test_a_head_that_is_not_needed_drowns_in_noise() -> None:
    """And those that are needed keep their signal."""
    model, passage = tiny_decoder(), full_passage(prompt(12, batch=2))
    without_output(model, 1, HEAD)
    ratio = found(Vtrans(beta=1e-3), model, passage)
    assert float(ratio[1, "noise_to_signal"][0, HEAD]) > 5
    assert all((x < 0).sum() >= 3 for x in ratio.values()), "all others stay"
    few = Vtrans(beta=1e-3, steps=5)
    halves = [full_passage(passage.tokens[i : i + 1]) for i in (0, 1)]
    together, apart = found(few, model, passage), found(few, model, *halves)
    for key, values in together.items():
        close(apart[key], values, str(key), 1e-5)
        assert values.shape == (1, 4), "all passages together"


def test_a_gate_s_information() -> None:
    gate = Gate(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
    assert float(gate.information()) == pytest.approx(math.log(2) / 2)
    close(gate.ratio()[:1], torch.zeros(1).double(), "noise as large as signal", 1e-6, 1.0)
    assert float(gate.ratio()[1]) > 15
    with pytest.raises(ArgumentError, match="beta"):
        Vtrans(beta=0.0)
    scene = Scene.of(tiny_decoder(), [Passage({"input_ids": prompt(12)})])
    with pytest.raises(UnsupportedError, match="vtrans"):
        next(Vtrans().run(scene))


def test_no_reading_out_without_a_final_norm() -> None:
    passage = full_passage(prompt(12))
    scene = Scene.of(tiny_encoder(), [passage])
    with pytest.raises(UnsupportedError, match="readout"):
        next(probe_cards()["logit_lens"].build().run(scene))


def test_retrieval_asks_for_what_it_needs() -> None:
    retrieval, model, passage = (
        probe_cards()["retrieval"].build(),
        tiny_decoder(),
        full_passage(prompt(12)),
    )
    mute = replace(passage, answer=(passage.answer + 1) % 61)
    scene = Scene.of(model, [mute])
    findings = retrieval.run(scene)
    assert next(findings)[2].metrics["retrieval"].isnan().all()
    with pytest.raises(ArgumentError, match="answered"):
        list(findings)
    right = {**passage.inputs, "attention_mask": (torch.arange(12) < 8).long()[None]}
    with pytest.raises(ArgumentError, match="left"):
        next(retrieval.run(Scene.of(model, [replace(passage, inputs=right)])))
    with pytest.raises(ArgumentError, match="recall"):
        type(retrieval)(recall=1.0)
