"""The pocket language model does what its card says, and its recipe can be run again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import regard
from regard.core.errors import ArgumentError, UnknownNameError, UnsupportedError
from regard.recipes import pocket_card, pocket_language
from regard.recipes.measures import answered, first_token_share, generated, perplexity
from regard.recipes.pocket_language import Run
from regard.recipes.pocket_phases import SHAPE, Phase, Recipe
from regard.tasks.induction import Induction
from regard.tasks.needle import Needle
from regard.tasks.text import Text

pytest.importorskip("transformers")

SCORES = regard.pocket.card("language")["scores"]


@pytest.fixture(scope="module")
def model() -> Any:
    return regard.pocket.language()[0]


def test_it_is_an_ordinary_small_llama(model: Any) -> None:
    from transformers import LlamaForCausalLM

    assert type(model) is LlamaForCausalLM
    assert not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    vocabulary = regard.pocket.language()[1]
    assert model.config.vocab_size == len(vocabulary)
    assert model.config.bos_token_id == vocabulary.begin
    card = regard.pocket.card("language")
    assert card["parameters"] == sum(weight.numel() for weight in model.parameters())
    folder = Path(regard.pocket.__file__).parent / "language"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4_000_000


def test_loading_again_gives_the_same_model(model: Any) -> None:
    ids = torch.tensor([regard.pocket.language()[1].encode("The same, always.")])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, regard.pocket.language()[0](ids).logits)


@pytest.mark.parametrize("length", [256, 512, 1024])
def test_needles_are_found(model: Any, length: int) -> None:
    claimed = SCORES["needle"][str(length)]
    assert claimed >= 0.99
    assert generated(model, Needle(length, examples=192)) >= min(claimed, 0.99)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needles_are_found_at_any_depth(model: Any, depth: float) -> None:
    found = generated(model, Needle(512, depth=depth, examples=64))
    assert found >= SCORES["needle by depth"][str(depth)] - 0.05


@pytest.mark.parametrize(
    ("score", "make"),
    [
        ("recall", lambda length: Needle(length, facts=16, asked=16, examples=32)),
        ("copying", lambda length: Induction(length, 4, 48, examples=32)),
        ("induction", lambda length: Induction(length, 4, 48, fill="text", examples=32)),
    ],
)
@pytest.mark.parametrize("length", [256, 1024])
def test_answers_are_as_good_as_the_card_says(
    model: Any, score: str, make: Callable[[int], Any], length: int
) -> None:
    assert answered(model, make(length)) >= SCORES[score][str(length)] - 0.02


def test_text_is_predicted_as_well_as_the_card_says(model: Any) -> None:
    """The text differs a little between versions of Python."""
    found = perplexity(model, Text(examples=64))
    assert found == pytest.approx(SCORES["perplexity"]["1024"], rel=0.1)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'regard\[transformers\]'"):
        regard.pocket.language()


def test_unknown_models_have_no_card() -> None:
    with pytest.raises(UnknownNameError, match="language"):
        regard.pocket.card("languages")


class Oracle:
    """Knows the target of every token of the batch it is given; answers the rest with zeros."""

    def __init__(self, batch: Any, wrong: int) -> None:
        self.batch, self.wrong = batch, wrong

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        targets = self.batch.targets.clamp(min=0)
        targets[: self.wrong] = (targets[: self.wrong] + 1) % 512
        logits = torch.nn.functional.one_hot(targets, 512) * 50.0
        return type("Output", (), {"logits": logits})


def test_measures_count_what_is_right() -> None:
    subject = Needle(64, facts=2, examples=8)
    oracle = Oracle(next(subject.batches("test", 8)), wrong=2)
    assert answered(oracle, subject) == 6 / 8
    text = Text(32, examples=4)
    assert perplexity(Oracle(next(text.batches("test", 4)), 0), text) == pytest.approx(1.0)


def test_the_share_of_the_first_token_leaves_early_queries_out() -> None:
    weights = torch.zeros(1, 2, 8, 8)
    weights[:, 0, :, 0] = 1
    weights[:, 1, :2, 0], weights[:, 1, 2:, 1] = 1, 1
    output = type("Output", (), {"attentions": (weights,)})
    assert first_token_share(lambda **_: output, torch.zeros(1, 8)) == [[1.0, 0.0]]


MIXES = (((Needle(48, facts=2), 2),), ((Needle(64, facts=3), 1),))
TINY = Recipe(
    {**SHAPE, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    (
        Phase("copies", 2, (((Induction(24, 4, 8), 2),),), text=0.0),
        Phase("facts", 4, MIXES, last=0.5, drop=0.3),
    ),
)


@pytest.fixture(autouse=True)
def frequent_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pocket_language, "EVERY", 2)


def test_dropped_heads_say_nothing_and_come_back() -> None:
    model = Run(Path("nowhere"), 0, TINY).model
    ids, random = torch.tensor([[256, 300, 301]]), torch.Generator().manual_seed(0)
    before = model(ids).logits
    with pocket_language.heads_dropped(model, 1.0, random):
        without = model(ids).logits
    assert not torch.equal(before, without)
    assert torch.equal(before, model(ids).logits)
    torch.nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)
    assert torch.equal(without, model(ids).logits)


class Interrupted(Exception):
    pass


def trained(folder: Path, seed: int = 0, stop: int | None = None) -> dict[str, torch.Tensor]:
    def watch(moment: pocket_language.Moment) -> None:
        if moment.done == stop:
            raise Interrupted

    folder.mkdir(exist_ok=True)
    run = Run(folder, seed, TINY)
    run.train(watch)
    return run.model.state_dict()


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    with pytest.raises(Interrupted):
        trained(tmp_path / "parts", stop=5)
    assert Run(tmp_path / "parts", 0, TINY).done == 4
    parts = trained(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    other = trained(tmp_path / "other", seed=1)
    assert not all(torch.equal(whole[name], other[name]) for name in whole)
    with pytest.raises(ArgumentError, match="another recipe"):
        Run(tmp_path / "other", 0, TINY)


def test_phases_follow_one_another() -> None:
    found = [(phase.name, factor * 100) for phase, factor in map(TINY.phase_at, range(6))]
    assert [name for name, _ in found] == ["copies"] * 2 + ["facts"] * 4
    factors = [1, 2, 3, 4 * 0.875, 5 * 0.75, 6 * 0.625]
    assert [factor for _, factor in found] == pytest.approx(factors)
    with pytest.raises(ArgumentError, match="step"):
        TINY.phase_at(6)


def test_the_command_writes_the_model_and_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pocket_card, "scores", lambda model: {"layers": len(model.model.layers)})
    monkeypatch.setattr(pocket_language, "POCKET", TINY)
    monkeypatch.setattr(sys, "argv", ["pocket_language", "--out", str(tmp_path), "--seed", "3"])
    pocket_language.main()
    said = capsys.readouterr()
    assert said.out == ""
    names = {file.name for file in (tmp_path / "language").iterdir()}
    assert names == {"config.json", "model.safetensors", "card.json"}
    monkeypatch.setattr("regard.pocket.models.HERE", tmp_path)
    card = regard.pocket.card("language")
    assert card["scores"] == {"layers": 1}
    assert card["training"]["seed"] == 3
    assert regard.pocket.language()[0].dtype == torch.float32
