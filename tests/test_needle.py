"""Tasks of the pocket language model: facts in text, segments that come again, and text itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from regard.core.errors import ArgumentError, UnsupportedError
from regard.tasks import corpus
from regard.tasks.catalog import task
from regard.tasks.induction import Induction
from regard.tasks.needle import Needle
from regard.tasks.task import IGNORED
from regard.tasks.text import Text
from regard.tasks.vocabulary import ASK, BEGIN, BYTES, FIRST_SYMBOL, Vocabulary


@pytest.mark.parametrize("asked", [1, 3])
@pytest.mark.parametrize("value", [1, 3])
def test_every_answer_follows_from_a_fact_in_the_text(asked: int, value: int) -> None:
    subject = Needle(96, facts=4, value=value, asked=asked)
    batch = next(subject.batches("train", 32))
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        question = inputs.index(ASK)
        facts = [i for i in range(1, question) if inputs[i] >= FIRST_SYMBOL]
        assert len(facts) == len({inputs[i] for i in facts}) == 4 * (value + 1)
        assert inputs[0] == BEGIN
        assert sum(token < BYTES for token in inputs) == subject.noise
        for number in range(asked):
            key = question + number * (value + 2) + 1
            assert inputs[key - 1] == ASK
            shown = inputs.index(inputs[key])
            assert shown < question
            assert targets[key : key + value] == inputs[shown + 1 : shown + 1 + value]
        assert sum(target != IGNORED for target in targets) == asked * value


def test_a_question_is_the_example_cut_after_its_key() -> None:
    subject = Needle(80, facts=3, value=2)
    batch, question = (
        next(iter(drawn)) for drawn in (subject.batches("test", 16), subject.questions("test", 16))
    )
    size = question.prompt.shape[1]
    assert torch.equal(question.prompt, batch.inputs[:, :size])
    assert torch.equal(question.answer, batch.targets[batch.targets != IGNORED].view(16, 2))
    row = torch.arange(16)
    assert torch.equal(question.prompt[row, question.place - 1], question.prompt[:, -1])
    assert torch.equal(question.prompt[row, question.place + 1], question.answer[:, 1])


def test_depth_is_where_the_fact_stands() -> None:
    def places(depth: float | None) -> list[float]:
        question = next(Needle(256, depth=depth).questions("test", 64))
        return (question.place / question.prompt.shape[1]).tolist()

    assert max(places(0.0)) < 0.1
    assert min(places(1.0)) > 0.9
    assert 0.4 < min(places(0.5)) <= max(places(0.5)) < 0.6
    anywhere = places(None)
    assert min(anywhere) < 0.1
    assert max(anywhere) > 0.9


@pytest.mark.parametrize("fill", ["dense", "text"])
def test_a_repeated_segment_is_asked_for(fill: Any) -> None:
    batch = next(Induction(48, 3, 12, fill=fill).batches("train", 64))
    lags = set()
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        known = [i for i, target in enumerate(targets) if target != IGNORED]
        assert known == list(range(known[0], 48))
        before = inputs.index(inputs[known[0]])
        lags.add(known[0] - before)
        for step, place in enumerate(known):
            assert targets[place] == inputs[before + 1 + step]
    assert len(lags) > 5


def test_text_asks_for_the_next_byte(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_bytes(bytes(range(250)) * 8)
    batches = list(Text(32, file=str(file), examples=5).batches("test", 4))
    assert [len(batch.inputs) for batch in batches] == [4, 1]
    for batch in batches:
        assert (batch.inputs[:, 0] == BEGIN).all()
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        steps = batch.targets.diff(dim=1)
        assert ((steps == 1) | (steps == -249)).all()
    assert int(batches[1].targets[0, -1]) == 249, "the last passage ends where the text does"


def test_text_refuses(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("hardly anything")
    with pytest.raises(ArgumentError, match="at least 10240 bytes"):
        next(Text(file=str(file)).batches("test", 1))
    with pytest.raises(ArgumentError, match="readable"):
        next(Text(file=str(tmp_path / "none.txt")).batches("test", 1))


def test_a_python_without_documentation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UnsupportedError, match="documentation"):
        corpus.documents()


@pytest.mark.parametrize(
    ("name", "options", "argument"),
    [
        ("needle", {"length": 20}, "length"),
        ("needle", {"facts": 63}, "facts"),
        ("needle", {"facts": 2, "asked": 3}, "asked"),
        ("needle", {"asked": 0}, "asked"),
        ("needle", {"value": 0}, "value"),
        ("needle", {"depth": 1.5}, "depth"),
        ("needle", {"examples": 0}, "examples"),
        ("induction", {"longest": 63}, "longest"),
        ("induction", {"fill": "text", "longest": 33}, "longest"),
        ("induction", {"shortest": 1}, "shortest"),
        ("induction", {"shortest": 25}, "shortest"),
        ("induction", {"fill": "blank"}, "fill"),
        ("induction", {"examples": 0}, "examples"),
        ("text", {"length": 0}, "length"),
        ("text", {"examples": 0}, "examples"),
    ],
)
def test_out_of_range_options_are_refused(
    name: str, options: dict[str, Any], argument: str
) -> None:
    with pytest.raises(ArgumentError, match=f"^{argument}"):
        task(name, **options)


def test_vocabulary_keeps_any_text() -> None:
    vocabulary = Vocabulary()
    assert len(vocabulary) == 512
    for text in ("", "plain", "naïve ✓ 東京 \U0001f600\n\x00"):
        ids = vocabulary.encode(text)
        assert ids[0] == vocabulary.begin
        assert ids[1:] == vocabulary.encode(text, begin=False) == list(text.encode())
        assert vocabulary.decode(ids[1:]) == text
    assert vocabulary.decode([BEGIN, 104, ASK, 258, FIRST_SYMBOL, 511]) == (
        "⟨begin⟩h⟨ask⟩⟨unused258⟩⟨s0⟩⟨s247⟩"
    )
    assert vocabulary.decode([0xE2, 0x9C]) == "\ufffd"
    for token in (-1, 512):
        with pytest.raises(ArgumentError, match="ids"):
            vocabulary.decode([token])
