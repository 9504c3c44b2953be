"""Searches for samples: what they read, tell and go by; and the texts of the studies on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from regard.core.errors import ArgumentError
from regard.core.passage import Passage
from regard.core.scene import Scene
from regard.recipes.retrieval_heads import silencing_plan
from regard.searchers.diverse_influence import DiverseInfluence
from regard.searchers.judging import judged
from regard.searchers.kronecker_influence import KroneckerInfluence, linear_maps
from regard.searchers.sample_influence import SampleInfluence
from regard.studies.searching.diverse_samples import KINDS, DiverseSamples, rewritten
from regard.studies.searching.repeats_need_retrieval import RepeatsNeedRetrieval, told_apart
from regard.tasks.vocabulary import FIRST_SYMBOL
from regard.testing.tiny import prompt, tiny_decoder


def passage(ids: Tensor, **fields: Any) -> Passage:
    return Passage({"input_ids": ids}, ids, **fields)


def test_a_sample_with_an_answer_is_judged_by_it() -> None:
    model, heads = tiny_decoder(), [(0, 1), (2, 3)]
    ids, answer = prompt(9, batch=2), prompt(3, batch=2, seed=5)
    given = [passage(ids, answer=answer, domain="asked"), passage(prompt(7))]
    told: list[float] = []
    found = SampleInfluence().by_heads(model, heads, given, lambda share, _: told.append(share))
    for row in range(2):
        one = passage(ids[row : row + 1], answer=answer[row : row + 1])
        before = judged(model, [one], "loss")
        with silencing_plan(heads).applied(model):
            after = judged(model, [one], "loss")
        assert float(found.scores[0][row]) == pytest.approx((after - before) / before, rel=1e-6)
    assert told == [0.5, 1.0]
    assert [number for number, _ in found.kept] == [0, 1]


def test_influence_through_all_maps_of_the_layers() -> None:
    scene = Scene.of(tiny_decoder(), [passage(prompt(12, batch=2))])
    attention, layers = linear_maps(scene), linear_maps(scene, "layers")
    assert {name.rpartition(".")[2] for name in attention} == {
        f"{x}_proj" for x in ("q", "k", "v", "o")
    }
    assert {name.rpartition(".")[2] for name in set(layers) - set(attention)} == {
        f"{x}_proj" for x in ("gate", "up", "down")
    }
    assert set(attention) < set(layers)
    assert len(layers) == 3 * 7
    sample = passage(prompt(9, seed=3))
    found = [KroneckerInfluence(scene, 0.1, maps).of(sample) for maps in ("attention", "layers")]
    assert found[0] != found[1]
    for maps, expected in zip(("attention", "layers"), found, strict=True):
        search = DiverseInfluence(1, threshold=-1e9, maps=maps)  # type: ignore[arg-type]
        assert search.run(scene, [sample], [0]).influence == {0: pytest.approx(expected)}
    with pytest.raises(ArgumentError, match="maps"):
        linear_maps(scene, "mlp")  # type: ignore[arg-type]


def test_texts_differ_in_the_repetition_alone() -> None:
    study = RepeatsNeedRetrieval(texts=6, length=96)
    plain, repeats = study.written()
    for one, other in zip(plain.tolist(), repeats.tolist(), strict=True):
        start = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
        again = other[start:]
        assert one[:start] == other[:start]
        assert any(other[i : i + len(again)] == again for i in range(start - len(again)))
        assert min(one[start:]) >= FIRST_SYMBOL
        assert not set(one[start:]) & set(other)
        assert len(set(one[start:])) == len(again)
    sets = study.sets([(0, 0), (1, 1)], torch.zeros(2, 4))
    assert [len(set(heads)) for heads in sets] == [2] * 7
    assert not {(0, 0), (1, 1)} & {head for heads in sets[1:] for head in heads}
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])
    assert told_apart(low, high) == (3.5 / 4, 1.0)


def test_kinds_of_writing() -> None:
    ids = torch.tensor([[256, *b"Ab z.9"]])
    written = {kind: bytes(rewritten(ids, kind)[0, 1:].tolist()) for kind in KINDS}
    assert written == {
        "plain": b"Ab z.9",
        "capitals": b"AB Z.9",
        "moved": b"Ao m.9",
        "backwards": b"9.z bA",
        "digits": b"A1 5.9",
    }
    assert all(int(rewritten(ids, kind)[0, 0]) == 256 for kind in KINDS)
    study = DiverseSamples(length=16)
    parts = [study.texts("plain", 3, part) for part in range(3)]
    assert not any(torch.equal(parts[i], parts[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_figures_of_the_choices() -> None:
    """Of losses before, and after tuning on what each way has chosen."""
    losses = np.array([[4.0, 4.0], [2.0, 3.0], [1.0, 5.0], [3.0, 4.0], [4.0, 3.0]])
    values = [figure.value for figure in DiverseSamples().outcome(losses, 0.2).figures]
    assert values == pytest.approx([0.2, 3.0, 0.5, 2.0])
