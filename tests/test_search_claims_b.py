"""What searchers by trial go by: the scene's plan, no dropout, no rounding; and their studies."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.passage import Passage
from regard.core.scene import LAST, Scene, chosen
from regard.plan import Plan, Step
from regard.searchers.calibration_sets import CalibrationSets
from regard.searchers.greedy_heads import greedy_heads
from regard.searchers.head_sets import SAME, Treated, judging, treating
from regard.searchers.judging import judged
from regard.searchers.token_schedule import scored
from regard.searchers.zero_tuning import ZeroTuning
from regard.studies.searching.fewer_tokens_deeper import FewerTokensDeeper, judge
from regard.studies.searching.first_token_by_head import apart
from regard.studies.searching.texts import texts
from regard.tasks.vocabulary import BEGIN
from regard.testing.tiny import prompt, tiny_decoder
from regard.treatments.head_silence import HeadSilence
from regard.treatments.initial_token import InitialToken
from regard.treatments.sink_calibration import SinkCalibration

pytest.importorskip("transformers")


def scene_of(model: Any, length: int = 20) -> Scene:
    ids = prompt(length, batch=2)
    return Scene.of(model, [Passage({"input_ids": ids}, ids)])


def test_heads_are_judged_under_the_plan_of_the_scene() -> None:
    """With a silent layer beside them, untouched or treated."""
    model = tiny_decoder()
    plain = scene_of(model)
    silent = chosen(HeadSilence(), range(4), LAST - 1)
    under = Scene.of(model, plain.passages, {plain.sites[1].name: [silent]})
    step = Step(treatment="head_silence", layers=(1,))
    with Plan(steps=(step,)).applied(model):
        expected = judged(model, plain.passages, "loss")
    head = (under.sites[0], 2)
    objective = judging(under, "loss")
    untouched = objective(treating(under, InitialToken(3.0), ()))
    assert untouched == pytest.approx(expected, abs=1e-12)
    assert untouched != pytest.approx(judging(plain, "loss")(treating(plain, InitialToken(), ())))
    first = Step(treatment="initial_token", options={"gamma": 3.0}, layers=(0,), heads=(2,))
    with Plan(steps=(step, first)).applied(model):
        expected = judged(model, plain.passages, "loss")
    found = objective(treating(under, InitialToken(3.0), [head]))
    assert found == pytest.approx(expected, abs=1e-12)
    assert found != pytest.approx(untouched, abs=1e-9)


def test_heads_are_judged_without_dropout() -> None:
    model = tiny_decoder()
    model.model.embed_tokens.register_forward_hook(
        lambda module, _, out: nn.functional.dropout(out, 0.5, module.training)
    )
    scene = scene_of(model)
    sure = judging(scene, "loss")(treating(scene, HeadSilence(), ()))
    ids = scene.passages[0].inputs["input_ids"]
    answered = [Passage({"input_ids": ids[:, :16]}, ids[:, :16], answer=ids[:, 16:])]
    score = scored(model, answered, "snapkv", {"window": 2})
    kept = score((1.0, 0.5, 0.5))
    model.train()
    assert score((1.0, 0.5, 0.5)) == kept
    assert judging(scene, "loss")(treating(scene, HeadSilence(), ())) == sure

    def objective(treated: Treated) -> float:
        with treated():
            return judged(model, scene.passages, "loss")

    assert greedy_heads(scene, HeadSilence(), objective).untouched == sure
    assert model.training


def test_a_calibration_without_sinks_gains_nothing() -> None:
    """The weights are told, not fused, and may round otherwise; no head is kept for that."""
    model = tiny_decoder().float()
    scene = scene_of(model)
    search = CalibrationSets(SinkCalibration(threshold=2.0), by="loss", skip_first=0, skip_last=0)
    found = search.run(scene)
    assert max(map(abs, found.gains.values())) < SAME
    assert found.heads == found.plan.steps == ()


def test_gamma_may_go_by_another_measure_than_the_heads() -> None:
    scene = scene_of(tiny_decoder())
    both = ZeroTuning(by="loss", shared=False).run(scene)
    mixed = ZeroTuning(by="loss", tuned_by="entropy", shared=False).run(scene)
    assert (mixed.up, mixed.down) == (both.up, both.down)
    objective = judging(scene, "entropy")
    for gamma, score in mixed.scores.items():
        treated = treating(scene, InitialToken(gamma), mixed.heads if gamma != 1 else ())
        assert score == pytest.approx(objective(treated), abs=1e-12)
    assert mixed.untouched == mixed.scores[1.0] != both.untouched
    alone = {head: float(head in mixed.up) for head in (*mixed.up, *mixed.down)}
    assert apart(alone, mixed) == 1.0


def test_texts_begin_alike_and_differ() -> None:
    given = texts(9, 40, "valid", 0)
    ids = torch.cat([passage.inputs["input_ids"] for passage in given])
    assert ids.shape == (40, 10)
    assert bool((ids[:, 0] == BEGIN).all())
    assert not torch.equal(
        ids, torch.cat([p.inputs["input_ids"] for p in texts(9, 40, "valid", 1)])
    )
    with pytest.raises(ArgumentError, match="count"):
        texts(9, 0, "valid", 0)


def test_what_schedules_lose_is_compared() -> None:
    """A planted model that needs the shallow half whole."""

    def score(shares: tuple[float, ...]) -> float:
        return -sum(1 - share for share in shares[:2])

    outcome = judge(score, (1.0, 0.9, 0.1, 0.0), (1.0, 0.8, 0.2, 0.0), 0.5)
    assert outcome.holds
    own, tuned = (outcome.figures[i].value for i in (1, 4))
    assert (own, tuned) == (pytest.approx(0.1), pytest.approx(0.2))
    assert not judge(score, (0.0, 0.1, 0.9, 1.0), (0.5,) * 4, 0.5).holds


def test_the_schedule_study_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    study = FewerTokensDeeper(levels=2, trials=2, length=64, questions=2)
    with pytest.raises(UnsupportedError, match=r"regard\[search\]"):
        study.run(lambda share: None)
    told: list[float] = []
    monkeypatch.undo()
    pytest.importorskip("optuna")
    study.run(told.append)
    assert all(a <= b for a, b in pairwise(told))
    assert told[-1] == 1.0
