"""Choosing among architectures: the explorers on made-up losses, and the supernet on recall."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from regard.bench.compare import compare
from regard.bench.comparison import Comparison
from regard.bench.mixing import MixtureRecord, TaskShell, with_mixture
from regard.bench.network import answers
from regard.bench.record import read_record
from regard.bench.spec import Spec, parse_spec, parse_specs
from regard.bench.store import Store
from regard.bench.study import Study
from regard.bench.training import run_trial
from regard.bench.trial import Budget, Network
from regard.cli.main import app
from regard.core.errors import ArgumentError, UnknownNameError
from regard.searchers.architectures import Architectures, Choice
from regard.searchers.exploring import Explored, Method, explore, ranker
from regard.searchers.supernet import Supernet, joined, path_loss
from regard.tasks.catalog import task

METHODS: tuple[Method, ...] = ("random", "evolution", "ranking")
TASK = "recall(vocab=32,length=16,pairs=4,examples=128)"
WINDOW = "sliding_window(window=2, sinks=0)"
MIXED = Spec(name="hybrid", options={"layers": ("softmax", WINDOW)})


class Additive:
    """A loss that is a sum over places, and noiseless; it counts its measurements."""

    def __init__(self, places: int, parts: int, seed: int) -> None:
        self.table = np.random.default_rng(seed).normal(size=(places, parts))
        self.asked: list[Choice] = []

    def __call__(self, choice: Choice) -> float:
        self.asked.append(choice)
        return float(self.table[np.arange(len(choice)), list(choice)].sum())


# Exploring


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", ["evolution", "ranking"])
def test_the_optimum_of_an_additive_loss_is_found(method: Method, seed: int) -> None:
    loss, space = Additive(8, 3, seed), Architectures(((1.0,) * 3,) * 8)
    found = explore(space, loss, method=method, measurements=200, seed=seed)
    assert found.best == tuple(loss.table.argmin(1).tolist())  # of 6561 choices
    assert len(loss.asked) == len(set(loss.asked)) == 200


@pytest.mark.parametrize("method", METHODS)
def test_the_limit_holds(method: Method) -> None:
    costs = ((3.0, 1.0, 0.5), (5.0, 0.0), (2.0, 2.0, 1.0, 4.0), (1.0,), (3.0, 0.0), (2.5, 0.1))
    space = Architectures(costs, limit=8.2)
    found = explore(space, lambda a: -space.cost(a), method=method, measurements=20, seed=1)
    assert all(space.cost(choice) <= 8.2 for choice in found.losses)
    assert len(found.losses) == 20
    every = explore(space, lambda a: -space.cost(a), measurements=10**4)
    within = [a for a in itertools.product(*map(range, map(len, costs))) if space.cost(a) <= 8.2]
    assert sorted(every.losses) == within
    if method != "random":
        assert found.losses[found.best] == every.losses[every.best]


def test_fewer_choices_within_the_limit_than_measurements() -> None:
    space = Architectures(((0.0, 9.0),) * 40, limit=9.0)  # 2^40 choices, 41 of them within
    found = explore(space, space.cost, measurements=100)
    assert len(found.losses) == 41
    assert found.best == (0,) * 40


def test_ties_go_to_the_cheaper_then_the_earlier() -> None:
    space = Architectures(((2.0, 1.0, 1.0), (1.0, 1.0)))
    assert explore(space, lambda choice: 0.0).best == (1, 0)


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides(method: Method) -> None:
    def order(seed: int) -> list[Choice]:
        space = Architectures(((1.0,) * 4,) * 6)
        return list(explore(space, Additive(6, 4, 0), method=method, seed=seed).losses)

    assert order(3) == order(3)
    assert order(3) != order(4)


@pytest.mark.parametrize("seed", range(3))
def test_the_ranker_orders_what_it_never_saw(seed: int) -> None:
    """Kendall's tau above 0.9 on noiseless additive losses."""
    loss, space = Additive(5, 3, seed), Architectures(((1.0,) * 3,) * 5)
    seen = explore(space, loss, method="random", measurements=80, seed=seed)
    rest = [choice for choice in space.every if choice not in seen.losses]
    scores, true = space.one_hot(rest) @ ranker(seen), np.array([loss(choice) for choice in rest])
    agree = np.sign(scores[:, None] - scores) * np.sign(true - true[:, None])
    assert agree.sum() / (len(rest) * (len(rest) - 1)) > 0.9


def test_what_cannot_be_met_says_what_can() -> None:
    with pytest.raises(ArgumentError, match=r"limit: expected at least 3\.5, got 3"):
        Architectures(((1.5, 2.0), (2.0,)), limit=3.0)
    with pytest.raises(ArgumentError, match="costs"):
        Architectures(((1.0,), ()))
    with pytest.raises(ArgumentError, match="at least 1"):
        explore(Architectures(((1.0,),)), lambda choice: 0.0, measurements=0)
    assert Explored(Architectures(((1.0,),)), {(0,): 1.0}).best == (0,)


# Supernet


def study(mechanisms: str = f"softmax,{WINDOW}", steps: int = 200, **options: Any) -> Study:
    settings: dict[str, Any] = {
        "task": parse_spec(TASK, "task"),
        "mechanisms": parse_specs(mechanisms, "mechanisms"),
        "lrs": (1e-2,),
        "seeds": (0,),
        "network": Network(dim=32, heads=1, layers=2),
        "budget": Budget(steps=steps, batch=64, every=50),
    }
    return Study(**{**settings, **options})


def shell(layers: int = 2) -> TaskShell:
    spec = parse_spec(TASK, "task")
    network = Network(dim=32, heads=1, layers=layers)
    return TaskShell(network, task(spec.name, **spec.options), decodes=True)


@pytest.mark.parametrize("seed", range(3))
def test_the_mixture_that_can_recall_is_found(seed: int, tmp_path: Path) -> None:
    """Of two layers one may be softmax attention. The other mixtures cannot look back far enough,
    or only where no layer is left to use it.
    """
    found = with_mixture(study(seeds=(seed,)), 0.7, tmp_path)
    assert found.mechanisms[2:] == (MIXED,)
    (record,) = Store(tmp_path / "mixtures", MixtureRecord).records.values()
    assert 0.5 < record.part <= 0.7
    assert f"softmax | {WINDOW}" in record.losses
    assert "softmax | softmax" not in record.losses


def test_the_winner_is_trained_alone_beside_the_others(tmp_path: Path) -> None:
    comparison = compare(with_mixture(study(), 0.7, tmp_path), tmp_path)
    softmax, window, mixed = comparison.rows
    assert mixed.label == MIXED.label
    assert mixed.family == "hybrid"
    assert mixed.citations == (*softmax.citations, *window.citations)
    assert mixed.accuracy_mean > 0.9 > 0.4 > window.accuracy_mean
    assert mixed.state_bytes is not None
    assert softmax.state_bytes is not None
    assert window.state_bytes is not None
    assert 2 * mixed.state_bytes == softmax.state_bytes + window.state_bytes


def test_the_same_search_finds_the_same_and_is_kept(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    some = study(steps=20)
    with_mixture(some, 0.7, tmp_path / "one")
    (path,) = (tmp_path / "one" / "mixtures").iterdir()
    text, written = path.read_text(), path.stat().st_mtime_ns
    torch.manual_seed(9)
    with_mixture(some, 0.7, tmp_path / "two")
    assert (tmp_path / "two" / "mixtures" / path.name).read_text() == text
    with_mixture(some, 0.7, tmp_path / "one")
    assert path.stat().st_mtime_ns == written
    torch.manual_seed(0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_one_candidate_is_the_plain_model() -> None:
    """Its supernet is that network, weights and all, and its loss the one the network has."""
    around = shell()
    torch.manual_seed(5)
    network, places = joined([around.build([("softmax", {})] * 2)])
    torch.manual_seed(5)
    plain = around.build([("softmax", {})] * 2)
    batch = next(around.task.batches("valid", 8))
    assert torch.equal(around.answers(network, batch)[0], around.answers(plain, batch)[0])
    found = Supernet(steps=2, batch=8).search(around, around.task, [("softmax", {})], 2)
    assert (found.choice, found.part, len(found.losses)) == ((0, 0), 1.0, 1)
    scores, targets = answers(plain, batch)  # type: ignore[arg-type]
    mean = float(torch.nn.functional.cross_entropy(scores.double(), targets).detach())
    assert path_loss(around, network, places, (0, 0), [batch]) == pytest.approx(mean, rel=1e-12)


def test_a_path_is_the_network_of_its_mechanisms() -> None:
    """What a path computes is what that mixture computes with the same weights."""
    around = shell()
    specs = [("softmax", {}), ("sliding_window", {"window": 2, "sinks": 0})]
    network, places = joined([around.build([spec] * 2) for spec in specs])
    plain = around.build([specs[1], specs[0]])
    for layer, (place, part) in enumerate(zip(places, (1, 0), strict=True)):
        place.now = part
        blocks: Any = plain.blocks
        blocks[layer].mixer.mixer = place.mixers[part]
    shared = {n: x for n, x in network.state_dict().items() if ".mixers." not in n}
    plain.load_state_dict(shared, strict=False)
    batch = next(around.task.batches("valid", 8))
    assert torch.equal(around.answers(network, batch)[0], around.answers(plain, batch)[0])


def test_grids_are_searched_by_operations(tmp_path: Path) -> None:
    digits = study(
        "softmax,uniform", 2, task=Spec(name="digits"), network=Network(dim=16, heads=2, layers=2)
    )
    with_mixture(digits, 1.0, tmp_path)
    (record,) = Store(tmp_path / "mixtures", MixtureRecord).records.values()
    assert len(record.losses) == 4
    assert 0 < record.part <= 1


# Hybrids


def test_a_hybrid_takes_turns() -> None:
    parts = MIXED.over(3)
    assert [part.label for part in parts] == ["softmax", WINDOW, "softmax"]
    assert parse_spec(MIXED.label, "task") == MIXED
    for options in ({}, {"layers": ()}, {"layers": "softmax"}, {"layers": ("softmax",), "n": 1}):
        with pytest.raises(ArgumentError, match="hybrid"):
            Spec(name="hybrid", options=options).over(2)


def test_a_hybrid_trial_is_a_record(tmp_path: Path) -> None:
    config = study(steps=2, mechanisms=MIXED.label).trials[0]
    trial = run_trial(config, shell().task, lambda moment: None)
    assert type(trial).model_validate_json(trial.model_dump_json()) == trial
    with pytest.raises(UnknownNameError, match="did you mean softmax"):
        compare(study(mechanisms="hybrid(layers=('softmx',))"), tmp_path)


# The command


def test_command(tmp_path: Path) -> None:
    flags = ["compare", "--task", TASK, "--steps", "2", "--dim", "16", "--lrs", "1e-2"]
    flags += ["--mechanisms", f"softmax,{WINDOW}", "--out", str(tmp_path), "--search", "0.9"]
    result = CliRunner().invoke(app, flags)
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "mixtures").iterdir())) == 1
    rows = read_record(tmp_path / "comparison.json", Comparison).rows
    assert [row.label for row in rows][:2] == ["softmax", WINDOW]
    impossible = CliRunner().invoke(app, [*flags, "--search", "0.01"])
    assert impossible.exit_code == 2
    assert "part: expected at least" in impossible.stderr
    alone = CliRunner().invoke(app, [*flags, "--mechanisms", "softmax"])
    assert "search: expected two mechanisms or more" in alone.stderr
