"""Searchers by known answers: planted heads, layers and samples; what the pocket model keeps."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from families import CALLERS
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import regard
from regard.core.catalog import searcher_cards
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.moment import Moment
from regard.core.passage import Passage
from regard.core.scene import Scene
from regard.core.treatment import Treatment
from regard.importance.influence import influence
from regard.importance.kronecker import Factors
from regard.importance.layer_similarity import Drops
from regard.lenses.gradient_attention import gradient_attention
from regard.plan import Plan, PlanError, Step
from regard.recipes.layer_similarity import drop_plan, stretch_similarity
from regard.searchers.answering import mean_loss
from regard.searchers.bandit import ClusterBandit, clustered
from regard.searchers.calibration_sets import CalibrationSets
from regard.searchers.diverse_influence import DiverseInfluence
from regard.searchers.elastic_rules import elastic_rules, span_effects, span_losses
from regard.searchers.elastic_spans import ElasticSpans
from regard.searchers.fitting import decoder_sites
from regard.searchers.greedy_heads import greedy_heads
from regard.searchers.head_sets import Objective, Treated, every_head, judging, treating
from regard.searchers.judging import judged, predicted, whole
from regard.searchers.kronecker_influence import KroneckerInfluence
from regard.searchers.layer_dropping import layer_dropping
from regard.searchers.map_sharing import map_sharing
from regard.searchers.own_answers import own_answers
from regard.searchers.pareto import pareto
from regard.searchers.retrieval_gates import RetrievalGates
from regard.searchers.rules import Rule
from regard.searchers.sample_influence import SampleInfluence, top_heads
from regard.searchers.sigmoid_schedule import LEAST, sigmoid_shares, tuned_schedule
from regard.searchers.solver import front
from regard.searchers.token_schedule import greedy_schedule, schedule_plan, scored
from regard.searchers.zero_tuning import ZeroTuning
from regard.tasks.induction import Induction
from regard.tasks.needle import Needle
from regard.tasks.task import IGNORED, Batch
from regard.testing.compare import close
from regard.testing.tiny import prompt, tiny_decoder, tiny_encoder
from regard.treatments.head_silence import HeadSilence
from regard.treatments.initial_token import InitialToken
from regard.treatments.sink_calibration import SinkCalibration
from regard.treatments.stream import Stream
from regard.treatments.uniform_heads import UniformHeads

pytest.importorskip("transformers")
pytest.importorskip("scipy")


def passage(ids: Tensor, **fields: Any) -> Passage:
    return Passage({"input_ids": ids}, ids, **fields)


def passages_of(batches: Iterator[Batch], count: int, domain: str = "") -> list[Passage]:
    """Batches of a task with the tokens that are asked scored."""
    found = []
    for batch in itertools.islice(batches, count):
        ids = torch.cat([batch.inputs, batch.targets[:, -1:]], 1)
        ids[:, -1] = ids[:, -1].clamp_min(0)
        scored = torch.zeros_like(ids, dtype=torch.bool)
        scored[:, 1:] = batch.targets != IGNORED
        found.append(passage(ids, scored=scored, domain=domain))
    return found


def unused(model: Any, keep: Sequence[tuple[int, int]]) -> Any:
    """The tiny decoder with the output of all heads ignored but of these (layer, head)."""
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            for head in range(4):
                if (layer, head) not in keep:
                    block.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] = 0
    return model


@pytest.fixture(scope="module")
def pocket() -> Any:
    return regard.pocket.language()[0]


@pytest.mark.parametrize("name", searcher_cards())
def test_cards_say_what_they_are(name: str) -> None:
    card = searcher_cards()[name]
    assert card.summary
    assert card.papers
    assert card.claim.command.startswith("regard ")
    assert card.build.__doc__


# What a search goes by


def test_an_answer_is_read_with_its_prompt() -> None:
    ids, answer = prompt(9, batch=2), torch.tensor([[4, 5, 6], [7, 8, 9]])
    scored = torch.tensor([[True, True, True], [True, False, False]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given = Passage(inputs, ids, answer=answer, scored=scored)
    read = whole(given)
    assert read.tokens is not None
    assert read.tokens.shape == (2, 12)
    assert read.inputs["attention_mask"].shape == (2, 12)
    logs = tiny_decoder()(read.tokens).logits.log_softmax(-1)
    said = -logs[:, 8:11].gather(-1, answer[..., None])[..., 0]
    expected = torch.stack([said[0].mean(), said[1, 0]])
    close(predicted(tiny_decoder(), given).losses(), expected.double(), "losses", 1e-6)
    with pytest.raises(UnsupportedError, match="ids and their mask"):
        whole(Passage({"input_ids": ids, "position_ids": ids}, ids, answer=answer))


def test_measures_of_a_known_prediction() -> None:
    """A model that says the same of everything."""

    class Says(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            logits = torch.tensor([0.7, 0.2, 0.1]).log()
            return logits.expand(*input_ids.shape, 3)

    ids = torch.tensor([[0, 0, 1, 0]])
    assert judged(Says(), [passage(ids)], "accuracy") == pytest.approx(2 / 3)
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert judged(Says(), [passage(ids)], "entropy") == pytest.approx(-entropy)
    loss = -(2 * math.log(0.7) + math.log(0.2)) / 3
    assert judged(Says(), [passage(ids)], "loss") == pytest.approx(-loss)
    with pytest.raises(ArgumentError, match="by"):
        judged(Says(), [passage(ids)], "other")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="something to predict"):
        judged(Says(), [], "loss")


# Elastic spans


def test_effects_are_those_of_the_influence() -> None:
    """Of two sequences their mean, of query heads that share keys their sum."""
    model, ids = tiny_decoder(), prompt(12, batch=2)
    sites = decoder_sites(model)
    got = span_effects(model, sites, [passage(ids)], block=4)
    singles = [span_effects(model, sites, [passage(row[None])], block=4) for row in ids]
    close(got, (singles[0] + singles[1]) / 2, "effects", 1e-6)
    loss = predicted(model, passage(ids[:1])).losses
    calls = gradient_attention(model, lambda: predicted(model, passage(ids[:1])).losses().sum())
    assert loss().shape == (1,)
    call = calls[1]
    assert call.gradient is not None
    effect = influence(call.weights, call.gradient)[0, 2:].abs().sum(0)  # heads of key head 1
    by_hand = effect.view(3, 4, 3, 4).sum((1, 3))
    close(singles[0][3], by_hand.double(), "by hand", 1e-9)
    with pytest.raises(ArgumentError, match="one length"):
        span_effects(model, sites, [passage(ids), passage(ids[:, :7])], block=4)
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[0] * 3 + [1] * 9, [1] * 12])}
    with pytest.raises(UnsupportedError, match="padded"):
        span_effects(model, sites, [Passage(padded, ids)], block=4)


def test_rules_are_those_of_the_paper() -> None:
    rules = elastic_rules([2048, 4096, 8192])
    windows = [(r.options["alpha"], r.options["beta"]) for r in rules if r.treatment]
    assert all(a + b * 2048 > 0 and a + b * 8192 <= 8192 for a, b in windows)
    assert all(a + b * 16384 <= 16384 for a, b in windows)
    assert (-1024.0, 0.625) in windows
    assert (8192.0, 0.0) in windows
    assert (0.0, 1.0) not in windows
    assert [r.label for r in rules].count("dense") == 1
    assert len(set(windows)) == len(windows)
    window = next(r for r in rules if r.options.get("alpha") == 1024 and r.options["beta"] == 0.25)
    assert window.kept(4096) == 1024 + 1024 + 64
    assert window.kept(100) == 100
    with pytest.raises(ArgumentError, match="lengths"):
        elastic_rules([])


def test_what_a_rule_hides() -> None:
    """By hand: everything outside the window and the first block, below the diagonal."""
    effects = torch.rand(3, 5, 5).tril()
    rules = (
        Rule(None),
        *elastic_rules([20], block=4, sinks=1, step=4, slopes=2),
    )
    losses = span_losses(effects, rules, 20, 4)
    assert not losses[:, 0].any()
    for column, rule in enumerate(rules):
        if rule.treatment is None:
            continue
        band = max(1, int(rule.options["alpha"] // 4 + rule.options["beta"] * 5))
        hidden = sum(
            effects[:, i, j]
            for i, j in itertools.product(range(5), range(1, 5))
            if i - j >= band and j <= i
        )
        expected = hidden if isinstance(hidden, Tensor) else torch.zeros(3)
        assert losses[:, column] == pytest.approx(expected.double().numpy(), abs=1e-6)
    wider = [losses[:, i] for i, r in enumerate(rules) if r.options.get("beta") == 0]
    assert all((b <= a + 1e-9).all() for a, b in itertools.pairwise(wider))
    with pytest.raises(ArgumentError, match="effects"):
        span_losses(effects, rules, 40, 4)


@pytest.mark.parametrize("seed", [0, 2, 6])  # fronts of four to seven plans
def test_the_front_against_every_plan(seed: int) -> None:
    """Four heads, three of them in a layer of two rules: a fine grid finds the whole front."""
    random = np.random.default_rng(seed)
    losses, costs = random.random((2, 4, 3)), random.random((1, 4, 3))
    budgets = np.array([1.3 * costs[0].mean(1).sum()])
    blocks, rows = np.array([0, 0, 0, 1]), np.arange(4)
    every = [
        np.array(x)
        for x in itertools.product(range(3), repeat=4)
        if costs[0, rows, list(x)].sum() <= budgets[0] and len({*x[:3]}) <= 2
    ]
    values = np.array([losses[:, rows, x].sum(1) for x in every])
    found = pareto(losses, costs, budgets, blocks=blocks, distinct=2, points=40)
    got = np.array([losses[:, rows, x].sum(1) for x in found])
    best = values[front(values)]
    assert len(best) > 3
    assert got[got[:, 0].argsort()] == pytest.approx(best[best[:, 0].argsort()])


def needles(length: int, count: int, split: Any, seed: int = 0) -> list[Passage]:
    task = Needle(length, examples=count)
    return passages_of(task.batches(split, 8, seed), count // 8)


def test_spans_beat_one_window_for_all(pocket: Any) -> None:
    """At the same density, at a length that was not profiled."""
    search = ElasticSpans(density=0.5, block=16)
    profiled = [*needles(127, 8, "valid"), *needles(255, 8, "valid")]
    found = search.run(pocket, profiled, needles(383, 8, "valid", seed=3))
    assert (found.densities <= 0.5 + 1e-9).all()
    assert found.lengths == (128, 256, 384)
    assert found.plan == found.front[int(np.argmin(found.measured))]
    exam = needles(383, 16, "test")
    window = {"alpha": 0, "beta": 0.459, "block": 16}  # 11 of 24 blocks, and the first
    uniform = Plan(steps=(Step(treatment="moa", options=window),))
    losses = []
    for plan in (uniform, found.plan):
        with plan.applied(pocket):
            losses.append(-judged(pocket, exam, "loss"))
    assert losses[1] < 0.8 * losses[0]


def test_own_answers_are_what_is_said() -> None:
    model, ids = tiny_decoder(), prompt(8, batch=2)
    told = passage(ids, domain="web", scored=torch.zeros_like(ids, dtype=torch.bool))
    (found,) = own_answers(model, [told], 3)
    assert found.answer is not None
    assert found.answer.shape == (2, 3)
    assert found.domain == "web"
    assert judged(model, [found], "accuracy") == 1.0
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    (beside,) = own_answers(model, [Passage({"input_ids": ids, "attention_mask": mask}, ids)], 3)
    (alone,) = own_answers(model, [passage(ids[:1, 2:])], 3)
    assert beside.answer is not None
    assert alone.answer is not None
    assert beside.answer[0].tolist() == alone.answer[0].tolist()
    right = Passage({"input_ids": ids, "attention_mask": mask.flip(1)}, ids)
    with pytest.raises(ArgumentError, match="left"):
        own_answers(model, [right], 3)
    with pytest.raises(UnsupportedError, match="generate"):
        own_answers(Vision(), [passage(ids)], 3)


def test_bad_spans() -> None:
    model, given = tiny_decoder(), [passage(prompt(16))]
    with pytest.raises(ArgumentError, match="density"):
        ElasticSpans(density=0)
    with pytest.raises(ArgumentError, match="passages"):
        ElasticSpans().run(model, [], given)
    with pytest.raises(ArgumentError, match=r"at least 0\.5"):
        ElasticSpans(density=0.3, block=4).run(model, given, given)
    with pytest.raises(ArgumentError, match="decoder"):
        ElasticSpans().run(tiny_encoder(), given, given)


# Heads by trial


def taught(model: Any, treatment: Treatment, heads: Sequence[tuple[int, int]]) -> Passage:
    """A passage whose right answers are what the model says with these heads treated."""
    ids = prompt(40, batch=4)
    scene = Scene.of(model, [passage(ids)])
    with torch.no_grad(), treating(scene, treatment, [(scene.own[a], b) for a, b in heads])():
        said = model(ids).logits.argmax(-1)
    return Passage({"input_ids": ids}, torch.cat([ids[:, :1], said[:, :-1]], 1))


def test_zero_tuning_finds_a_planted_head_and_gamma() -> None:
    """Of all heads only number 1 is heard, and the answers are those of gamma = 4."""
    heads = [(layer, 1) for layer in range(3)]
    model = unused(tiny_decoder(), heads)
    scene = Scene.of(model, [taught(model, InitialToken(4.0), heads)])
    found = ZeroTuning().run(scene)
    assert [(site.layer, head) for site, head in found.up] == heads
    assert found.down == ()
    assert found.gamma == 4.0
    assert found.scores[4.0] == 1.0 > found.untouched
    assert found.plan.steps[0].options == {"gamma": 4.0}
    with found.plan.applied(model):
        assert judged(model, scene.passages, "accuracy") == 1.0
    other = ZeroTuning(trial=0.5).run(scene)
    assert other.up == found.up, "less of the first token hurts: the same heads are up-effective"
    assert other.gamma == 4.0


def test_zero_tuning_without_answers() -> None:
    scene = Scene.of(tiny_decoder(), [passage(prompt(20, batch=2))])
    found = ZeroTuning(by="entropy", shared=False, gammas=(0.5, 1.0, 3.0)).run(scene)
    assert len(found.up) + len(found.down) == 12
    assert set(found.scores) == {0.5, 1.0, 3.0}
    assert found.scores[found.gamma] == max(found.scores.values())
    again = ZeroTuning(by="entropy", shared=False, gammas=(3.0, 0.5)).run(scene)
    assert again.plan == found.plan


def test_zero_tuning_of_heads_that_do_not_matter() -> None:
    scene = Scene.of(unused(tiny_decoder(), []), [passage(prompt(12))])
    found = ZeroTuning().run(scene)
    assert (found.up, found.down, found.gamma, found.plan.steps) == ((), (), 1.0, ())
    for bad in ({"trial": 1.0}, {"gammas": ()}, {"trial": -1.0}):
        with pytest.raises(ArgumentError):
            ZeroTuning(**bad)


def test_calibration_keeps_the_heads_that_gain() -> None:
    """One head is heard; the answers are those of its calibration."""
    model = unused(tiny_decoder(), [(1, 2)])
    calibration = SinkCalibration(beta=0.0, alpha=1.2, margin=4)
    scene = Scene.of(model, [taught(model, calibration, [(1, 2)])])
    found = CalibrationSets(calibration, skip_first=0, skip_last=0).run(scene)
    gains = {(site.layer, head): gain for (site, head), gain in found.gains.items()}
    assert len(gains) == 12
    assert [head for head, gain in gains.items() if gain > 0] == [(1, 2)]
    assert found.untouched + gains[1, 2] == 1.0
    (step,) = found.plan.steps
    assert (step.layers, step.heads) == ((1,), (2,))
    with found.plan.applied(model):
        assert judged(model, scene.passages, "accuracy") == 1.0
    inner = CalibrationSets(calibration, skip_first=1).run(scene)
    assert {site.layer for site, _ in inner.gains} == {1}
    with pytest.raises(ArgumentError, match="some layer"):
        CalibrationSets(calibration).run(scene)


class Vision(nn.Module):
    """Plain PyTorch: two layers of attention over vectors, three heads each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Heads(), Heads()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 3
        self.qkv, self.out = nn.Linear(12, 36).double(), nn.Linear(12, 12).double()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def towards(forward: Any, wanted: Tensor) -> Objective:
    """Less the distance of what a model gives with treated heads from something."""

    @torch.no_grad()
    def objective(treated: Treated) -> float:
        with treated():
            return -float((forward() - wanted).norm())

    return objective


@pytest.mark.parametrize("kind", ["decoder", "vision"])
@pytest.mark.parametrize(("count", "rounds"), [(2, 1), (1, 2)])
def test_greedy_selection_finds_a_planted_pair(kind: str, count: int, rounds: int) -> None:
    if kind == "decoder":
        model, ids = tiny_decoder(), prompt(16)
        scene = Scene.of(model, [passage(ids)])
        planted = [(scene.sites[0], 3), (scene.sites[2], 0)]
    else:
        model, x = Vision(), torch.randn(2, 7, 12, dtype=torch.float64)
        scene = Scene.of(model, [Passage({"x": x})])
        planted = [(scene.sites[0], 1), (scene.sites[1], 2)]

    def forward() -> Tensor:
        found = model(**scene.passages[0].inputs)
        return found if isinstance(found, Tensor) else found.logits

    with torch.no_grad(), treating(scene, UniformHeads(), planted)():
        wanted = forward()
    found = greedy_heads(scene, UniformHeads(), towards(forward, wanted), count, rounds)
    assert sorted(found.heads, key=lambda h: h[0].layer) == planted
    assert found.reached[-1] == pytest.approx(0, abs=1e-9)
    assert found.untouched < found.scores[0]
    with torch.no_grad(), found.plan.applied(model):
        close(forward(), wanted, "the plan", 1e-9)


@pytest.mark.parametrize("family", ["diffusers UNet", "diffusers SD3 transformer"])
def test_greedy_selection_in_a_diffusion_model(family: str, torchvision_schemas: None) -> None:
    """Guidance: a pass with treated heads, as far from one without as a single head makes it."""
    pytest.importorskip("diffusers")
    model, inputs = CALLERS[family][1]()
    scene = Scene.of(model, [Passage(inputs)])

    @torch.no_grad()
    def objective(treated: Treated) -> float:
        plain = model(**inputs).sample
        with treated():
            return float((model(**inputs).sample - plain).norm())

    found = greedy_heads(scene, UniformHeads(), objective)
    every = {
        head: objective(treating(scene, UniformHeads(), [head])) for head in every_head(scene.own)
    }
    assert found.heads == (max(every, key=lambda head: every[head]),)
    assert found.untouched == 0.0
    with torch.no_grad():
        plain = model(**inputs).sample
        with found.plan.applied(model):
            gap = float((model(**inputs).sample - plain).norm())
    assert gap == pytest.approx(found.reached[0], rel=1e-5)


def test_greedy_selection_settles_ties_and_refuses() -> None:
    scene = Scene.of(tiny_decoder(), [passage(prompt(8))])
    told: list[float] = []
    found = greedy_heads(
        scene, HeadSilence(), lambda treated: 0.0, 2, 2, progress=lambda part, _: told.append(part)
    )
    assert [(site.layer, head) for site, head in found.heads] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert told == sorted(told)
    assert told[-1] == 1.0
    inner = greedy_heads(scene, HeadSilence(), lambda treated: 0.0, sites=scene.sites[1:])
    assert inner.heads[0][0].layer == 1
    for count, rounds in ((0, 1), (13, 1), (3, 5)):
        with pytest.raises(ArgumentError, match="count, rounds"):
            greedy_heads(scene, HeadSilence(), lambda treated: 0.0, count, rounds)
    with pytest.raises(ArgumentError, match="objective"):
        greedy_heads(scene, HeadSilence(), lambda treated: math.nan)


def test_heads_that_share_a_cache_are_chosen_together() -> None:
    """Of six pairs of query heads, the two that evict least of what counts."""
    ids = prompt(24, batch=2)
    given = passage(ids[:, :20], answer=ids[:, 20:])
    scene = Scene.of(tiny_decoder(), [given])

    def objective(treated: Treated) -> float:
        with treated():
            return -mean_loss(scene.model, [given])

    found = greedy_heads(scene, Stream(sinks=1, recent=4), objective, 1, 2)
    assert len(found.heads) == 4
    assert len(found.scores) == 2
    pairs = list(zip(found.heads[::2], found.heads[1::2], strict=True))
    assert all(a[0] == b[0] and a[1] // 2 == b[1] // 2 for a, b in pairs)
    measured = mean_loss(scene.model, [given], found.plan)
    assert measured == pytest.approx(-found.reached[-1])
    with pytest.raises(PlanError, match="whole groups"):
        treating(scene, Stream(recent=4), [(scene.sites[0], 1)])


def test_a_treatment_of_ones_own_is_in_no_plan() -> None:
    class Halved(Treatment):
        def output(self, output: Tensor, at: Moment) -> Tensor:
            return output / 2

    scene = Scene.of(tiny_decoder(), [passage(prompt(8))])
    found = greedy_heads(scene, Halved(), judging(scene, "loss"))
    assert len(found.heads) == 1
    with pytest.raises(UnsupportedError, match="Halved"):
        _ = found.plan


# Shares of tokens


def test_bisection_finds_planted_shares() -> None:
    planted = (1.0, 0.75, 0.75, 0.25, 0.125)

    def score(shares: tuple[float, ...]) -> float:
        return -sum(max(0.0, need - share) for need, share in zip(planted, shares, strict=True))

    found = greedy_schedule(score, 5, levels=8)
    assert found.shares == planted
    assert found.score == 0.0
    assert found.trials <= 1 + 5 * 3 + 1
    alone = greedy_schedule(score, 5, levels=8, nested=False)
    assert alone.shares == planted
    assert found.trials < alone.trials
    looser = greedy_schedule(score, 5, levels=8, tolerance=0.25)
    assert sum(looser.shares) < sum(planted)
    assert looser.score >= -0.25
    assert all(a >= b for a, b in itertools.pairwise(looser.shares))
    rising = greedy_schedule(lambda s: -max(0.0, 0.5 - s[1]), 2, levels=8)
    assert rising.shares == (0.5, 0.5), "dropped tokens are gone for the second layer too"
    free = greedy_schedule(lambda s: -max(0.0, 0.5 - s[1]), 2, levels=8, nested=False)
    assert free.shares == (0.125, 0.5)
    falling = greedy_schedule(lambda s: -float(s[1] > s[0] or s[1] < 0.6), 2, levels=8)
    assert falling.shares == (0.625, 0.625), "no layer is asked whether it keeps more"
    with pytest.raises(ArgumentError, match="tolerance"):
        greedy_schedule(score, 5, tolerance=-1)
    with pytest.raises(ArgumentError, match="score"):
        greedy_schedule(lambda s: math.nan, 2)


def test_a_schedule_is_a_plan() -> None:
    plan = schedule_plan("stream", (1.0, 0.5, 0.5, 0.25), {"sinks": 2})
    assert [(s.layers, s.options["budget"]) for s in plan.steps] == [((1, 2), 0.5), ((3,), 0.25)]
    assert schedule_plan("snapkv", (1.0, 1.0)).steps == ()
    ids = prompt(24, batch=2)
    given = [passage(ids[:, :20], answer=ids[:, 20:])]
    score = scored(tiny_decoder(), given, "snapkv", {"window": 2})
    found = greedy_schedule(score, 3, tolerance=1.0, levels=8)
    assert found.score >= score((1.0,) * 3) - 1.0
    with pytest.raises(PlanError):
        score((1.0, 2.0, 0.0))
    with pytest.raises(ArgumentError, match="3 layers"):
        score((1.0, 0.5))


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.9, 1.0])
@pytest.mark.parametrize(("steepness", "middle"), [(0.1, -40.0), (2.0, 0.2), (8.0, -1.0)])
def test_a_curve_keeps_its_budget(budget: float, steepness: float, middle: float) -> None:
    shares = sigmoid_shares(12, budget, steepness, middle)
    assert np.mean(shares) == pytest.approx(budget)
    assert all(1 >= a >= b >= 0 for a, b in itertools.pairwise(shares))
    with pytest.raises(ArgumentError, match="at least"):
        sigmoid_shares(12, 0.25, 1.0, 9.0)


def test_tuning_finds_a_planted_curve() -> None:
    pytest.importorskip("optuna")
    planted = sigmoid_shares(8, 0.4, 1.5, 2.0)

    def score(shares: tuple[float, ...]) -> float:
        assert np.mean(shares) == pytest.approx(0.4)
        assert min(shares) >= LEAST - 1e-9
        return -sum((a - b) ** 2 for a, b in zip(planted, shares, strict=True))

    found = tuned_schedule(score, 8, 0.4, trials=40)
    flat = score((0.4,) * 8)
    assert found.score > 0.05 * flat
    assert tuned_schedule(score, 8, 0.4, trials=40).shares == found.shares
    assert tuned_schedule(lambda s: -float(np.var(s)), 8, 0.4, trials=5).shares == (0.4,) * 8
    for budget in (LEAST, 1.1):
        with pytest.raises(ArgumentError, match="budget"):
            tuned_schedule(score, 8, budget)


def test_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UnsupportedError, match=r"regard\[search\]"):
        tuned_schedule(lambda s: 0.0, 4, 0.5)


# Gates


def test_gates_find_planted_heads() -> None:
    """Only the query heads of key head 1 in layer 1 are heard."""
    model = unused(tiny_decoder(), [(1, 2), (1, 3)])
    ids = prompt(14, batch=2)
    targets = torch.full_like(ids, IGNORED)
    targets[:, -4:] = 1
    told: list[float] = []
    search = RetrievalGates(sparsity=1.0 - 1 / 6, steps=60, learned=(0, 1), used=(2, 4))
    found = search.run(
        model, itertools.repeat(Batch(ids, targets)), lambda part, what: told.append(part)
    )
    assert int(found.gates.argmax()) == 3
    assert found.gates[1, 1] > 0.5 > found.gates.flatten()[[0, 1, 2, 4, 5]].max()
    steps = found.plan.steps
    streaming = {pair for s in steps for pair in itertools.product(s.layers, s.kv_heads or ())}
    assert streaming == set(itertools.product(range(3), range(2))) - {(1, 1)}
    assert told[-1] == 1.0
    with pytest.raises(ArgumentError, match="sparsity"):
        RetrievalGates(sparsity=2)


# Layers


def test_blocks_and_joint_lists_are_dropped() -> None:
    model, given = tiny_decoder(), [passage(prompt(12, batch=2))]
    with torch.no_grad():
        for module in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            module.weight.zero_()
    for in_turn in (False, True):
        (step,) = layer_dropping(model, given, 1, kind="block", in_turn=in_turn).steps
        assert (step.layers, step.options) == ((1,), {"sublayer": "both"})
        joint = layer_dropping(model, given, 2, kind="joint", in_turn=in_turn)
        assert {(s.options["sublayer"], s.layers) for s in joint.steps} == {
            ("attention", (1,)),
            ("mlp", (1,)),
        }
        more = layer_dropping(model, given, 2, kind="block", in_turn=in_turn)
        assert len(more.steps[0].layers) == 2
        assert 1 in more.steps[0].layers
    with pytest.raises(ArgumentError, match="kind"):
        layer_dropping(model, given, 1, kind="head")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="count"):
        layer_dropping(model, given, 4)


def test_what_similarity_drops_hurts_less_than_chance(pocket: Any) -> None:
    """Two sub-layers of eight, against the mean over every other pair."""
    given = needles(191, 8, "valid")
    exam = needles(191, 8, "test")
    names: Drops = tuple(itertools.product(("attention", "mlp"), range(4)))
    plans = [drop_plan(pair) for pair in itertools.combinations(names, 2)]
    plans.append(layer_dropping(pocket, given, 2, kind="joint"))
    losses = []
    for plan in plans:
        with plan.applied(pocket):
            losses.append(-judged(pocket, exam, "loss"))
    assert losses[-1] < np.mean(losses[:-1])


def test_layers_with_one_map_share_it() -> None:
    """Two layers that read the same and project alike attend alike."""
    model, ids = tiny_decoder(), prompt(14, batch=2)
    first, second = model.model.layers[1], model.model.layers[2]
    with torch.no_grad():
        second.self_attn.load_state_dict(first.self_attn.state_dict())
        second.input_layernorm.load_state_dict(first.input_layernorm.state_dict())
        for module in (first.self_attn.o_proj, first.mlp.down_proj):
            module.weight.zero_()
    found = map_sharing(model, [passage(ids)], 1 - 1e-6, skip_last=0)
    assert found.blocks == ((1, 2),)
    close(found.similarities[1, 2], torch.ones(()), "similarity", 1e-6)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        with found.plan.applied(model):
            close(model(ids, use_cache=False).logits, before, "shared", 1e-9)
    assert map_sharing(model, [passage(ids)], 1 - 1e-6).plan.steps == ()


# Samples


def test_repetitions_need_the_heads_that_retrieve(pocket: Any) -> None:
    repeated = passages_of(Induction(128, 8, 40).batches("valid", 8), 1)
    other = passages_of(Needle(127, facts=1).batches("valid", 8), 1)
    plain = [passage(p.tokens) for p in other if p.tokens is not None]  # text, all of it scored
    given = [*repeated, *plain]
    questions = itertools.islice(Needle(256, examples=16).questions("valid", 16), 1)
    search = SampleInfluence(heads=0.2, keep=0.5)
    found = search.run(pocket, questions, given)
    assert len(found.heads) == 3
    assert set(found.kept) == {(0, row) for row in range(8)}
    assert found.scores[0].min() > 2 * found.scores[1].max()
    nothing = search.by_heads(pocket, [], given)
    assert all(not x.any() for x in nothing.scores)


def test_kinds_of_data_are_not_compared() -> None:
    ids = prompt(12, batch=6)
    given = [passage(ids[:4], domain="web"), passage(ids[4:], domain="code")]
    found = SampleInfluence(keep=0.5).by_heads(tiny_decoder(), [(0, 1), (2, 3)], given)
    assert [number for number, _ in found.kept] == [0, 0, 1]
    web = found.scores[0].tolist()
    assert [row for _, row in found.kept[:2]] == sorted(range(4), key=lambda r: -web[r])[:2]
    assert top_heads(torch.tensor([[0.1, 0.5], [0.5, 0.2]]), 0.5) == ((0, 1), (1, 0))
    with pytest.raises(ArgumentError, match="share"):
        SampleInfluence(keep=0)
    with pytest.raises(ArgumentError, match="passages"):
        SampleInfluence().by_heads(tiny_decoder(), [], [])


def test_factors_against_the_whole_matrix() -> None:
    x, d, g = (torch.randn(n, m, dtype=torch.float64) for n, m in ((9, 3), (9, 4), (4, 3)))
    factors = Factors(x.T @ x / 9, d.T @ d / 9)
    lam = 0.3
    dense = torch.kron(factors.outputs, factors.inputs) + lam * torch.eye(12).double()
    expected = torch.linalg.solve(dense, g.flatten()).view(4, 3)
    close(factors.solved(g, lam), expected, "solved", 1e-9)
    close(factors.solved(g, 1e9) * 1e9, g, "much damping", 1e-6)
    one = Factors(x[:1].T @ x[:1], d[:1].T @ d[:1])
    rank = torch.outer(d[0], x[0])
    shrunk = rank / (float(d[0] @ d[0]) * float(x[0] @ x[0]) + lam)
    close(one.solved(rank, lam), shrunk, "rank one", 1e-9)
    for bad in (0.0, math.nan):
        with pytest.raises(ArgumentError, match="lam"):
            factors.solved(g, bad)
    with pytest.raises(ArgumentError, match="gradient"):
        factors.solved(g.T, lam)


def test_influence_is_the_fall_of_the_loss() -> None:
    """With much damping: the product of gradients, and what a small step does to the reference."""
    model = tiny_decoder()
    reference, sample = passage(prompt(12, batch=2)), passage(prompt(12, seed=4))
    found = KroneckerInfluence(Scene.of(model, [reference]), damping=1e9)
    mine, theirs = found.gradients(sample), found.gradients(reference)
    product = sum(float((mine[n] * theirs[n]).sum()) for n in mine)
    lams = {n: float((theirs[n] / found.wanted[n]).mean()) for n in mine}
    expected = sum(float((mine[n] * theirs[n]).sum()) / lams[n] for n in mine)
    assert found.of(sample) * found.scale == pytest.approx(expected, rel=1e-5)
    each = [found.of(passage(row[None])) for row in prompt(12, batch=2)]
    assert sum(each) / 2 == pytest.approx(1.0, rel=1e-4)
    step = 1e-6
    with torch.no_grad():
        before = float(predicted(model, reference).losses().sum()) * 11
        for name, module in found.maps.items():
            module.weight -= step * mine[name]
        after = float(predicted(model, reference).losses().sum()) * 11
    assert (before - after) / step == pytest.approx(product, rel=1e-2)


def test_padding_is_no_part_of_the_reference() -> None:
    model, ids = tiny_decoder(), prompt(10)
    filled = torch.cat([ids, torch.full((1, 4), 7)], 1)
    mask = torch.ones_like(filled)
    mask[:, 10:] = 0
    padded = Passage({"input_ids": filled, "attention_mask": mask}, filled)
    sample = passage(prompt(9, seed=3))
    alone, beside = (
        KroneckerInfluence(Scene.of(model, [p]), 0.1).of(sample) for p in (passage(ids), padded)
    )
    assert alone == pytest.approx(beside, rel=1e-5)


def test_the_bandit() -> None:
    bandit = ClusterBandit(3, alpha=0.5)
    assert [bandit.next(range(3)) for _ in range(2)] == [0, 0], "asking changes nothing"
    for cluster in range(3):
        assert bandit.next(range(3)) == cluster, "what was never drawn comes first"
        bandit.told(cluster, [float(cluster == 1)])
    for _ in range(200):
        cluster = bandit.next(range(3))
        bandit.told(cluster, [float(cluster == 1)])
    assert bandit.draws[1] > 180
    assert bandit.next([0, 2]) in (0, 2)
    with pytest.raises(ArgumentError, match="used up"):
        bandit.next([])
    with pytest.raises(ArgumentError, match="decay"):
        ClusterBandit(2, decay=0)


def test_clusters_of_directions() -> None:
    source = torch.Generator().manual_seed(0)
    centres = torch.eye(3, 8)
    truth = torch.arange(30) % 3
    noise = 0.05 * torch.randn(30, 8, generator=source)
    found = clustered((centres[truth] + noise) * torch.arange(1, 31)[:, None], 3, seed=2)
    assert len({(int(a), int(b)) for a, b in zip(truth, found, strict=True)}) == 3
    assert len(found.unique()) == 3
    with pytest.raises(ArgumentError, match="clusters"):
        clustered(centres, 4)


def test_samples_like_the_reference_are_kept() -> None:
    """One cluster holds pieces of the reference, two hold others: it is drawn from the most."""
    model, reference = tiny_decoder(), prompt(16, batch=4)
    good = [passage(row[None]) for row in reference.repeat(3, 1)]
    bad = [passage(prompt(16, seed=20 + i)) for i in range(24)]
    clusters = [0] * 12 + [1] * 12 + [2] * 12
    scene = Scene.of(model, [passage(reference)])
    search = DiverseInfluence(count=10, batch=2, threshold=0.0, alpha=0.2)
    found = search.run(scene, [*good, *bad], clusters)
    assert len(found.kept) == 10
    assert found.draws[0] > max(found.draws[1:])
    assert sum(i < 12 for i in found.kept) >= 6
    assert all(found.influence[i] > 0 for i in found.kept)
    assert len(found.influence) < 36, "most samples cost nothing"
    assert search.run(scene, [*good, *bad], clusters).kept == found.kept
    none = DiverseInfluence(count=8, threshold=1e30).run(scene, good, [0] * 12)
    assert none.kept == ()
    assert len(none.influence) == 12
    with pytest.raises(ArgumentError, match="clusters"):
        search.run(scene, good, [0])


# What is to be used, and what goes together


def test_floors_of_what_plans_cost() -> None:
    """Three heads of three rules: of all choices between floor and budget the best, or an error."""
    random = np.random.default_rng(1)
    losses = random.random((1, 3, 3))
    costs = np.broadcast_to(np.array([0.1, 0.2, 0.3]), (2, 3, 3)).copy()
    budgets, floors, rows = np.array([0.9, 0.9]), np.array([0.0, 0.75]), np.arange(3)
    (found,) = pareto(losses, costs, budgets, blocks=rows, floors=floors)
    every = [list(x) for x in itertools.product(range(3), repeat=3) if sum(x) >= 5]
    best = min(losses[0, rows, x].sum() for x in every)
    assert losses[0, rows, found].sum() == pytest.approx(best)
    (free,) = pareto(losses, costs, budgets, blocks=rows)
    assert losses[0, rows, free].sum() < best
    with pytest.raises(ArgumentError):
        pareto(losses, costs, budgets, blocks=rows, floors=np.array([0.95, 0.95]))


def test_plans_use_their_density() -> None:
    """Also where nothing is profiled, so that no loss asks for it; more of it never costs more."""
    model, given = tiny_decoder(), [passage(prompt(32, batch=2))]
    unseen = [passage(prompt(48, batch=2))]
    found = {
        (density, used): ElasticSpans(density, used, (64,), block=4).run(model, given, unseen)
        for density, used in ((0.5, 0.0), (0.5, 0.9), (0.75, 0.9))
    }
    assert found[0.5, 0.9].lengths == (32, 48, 64)
    for (density, used), spans in found.items():
        assert (spans.densities <= density + 1e-6).all()
        assert (spans.densities >= used * density - 1e-6).all()
    assert found[0.5, 0.0].densities.min() < 0.45
    least = {key: spans.predicted.min() for key, spans in found.items()}
    assert least[0.75, 0.9] <= least[0.5, 0.9]
    assert least[0.5, 0.0] <= least[0.5, 0.9]
    with pytest.raises(ArgumentError, match="used"):
        ElasticSpans(used=1.5)


def test_a_stretch_of_blocks_goes_together() -> None:
    """The second block undoes the first: alone each turns the stream, together they do not."""
    model, ids = tiny_decoder(), prompt(12, batch=2)
    first, second = model.model.layers[0], model.model.layers[1]
    turn = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64)).Q
    first.register_forward_hook(lambda m, a, y: a[0] @ turn)
    second.register_forward_hook(lambda m, a, y: a[0] @ turn.T)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    padded = [Passage({"input_ids": ids, "attention_mask": mask}, ids)]
    found = stretch_similarity(model, padded, 2)
    close(found[0], torch.ones(()).double(), "stretch", 1e-9)
    assert found[1] < 0.9
    (step,) = layer_dropping(model, padded, 2, kind="stretch").steps
    assert (step.layers, step.options) == ((0, 1), {"sublayer": "both"})
    apart = [passage(ids[:1]), passage(ids[1:, 5:])]
    close(stretch_similarity(model, apart, 2), found, "padding", 1e-6)
    with pytest.raises(ArgumentError, match="stretch"):
        layer_dropping(model, padded, 2, kind="stretch", in_turn=True)
    with pytest.raises(ArgumentError, match="count"):
        layer_dropping(model, padded, 4, kind="stretch")
