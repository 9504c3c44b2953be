"""Comparisons: records, resumption, the choice of a learning rate, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from regard.bench.compare import Progress, compare
from regard.bench.comparison import Comparison
from regard.bench.machine import Versions
from regard.bench.record import read_record, write_json
from regard.bench.spec import Spec, parse_options, parse_spec, parse_specs
from regard.bench.study import Study
from regard.bench.training import Training, run_trial
from regard.bench.trial import Budget, Network, Trial, TrialConfig
from regard.cli.main import app
from regard.core.errors import ArgumentError, UnsupportedError
from regard.tasks.catalog import task

TASK = "recall(vocab=32,length=16,pairs=2,examples=32)"
FLAGS = ("--task", TASK, "--steps", "3", "--dim", "16", "--layers", "1", "--batch", "8")
SMALL = Network(dim=16, heads=2, layers=1)
SHORT = Budget(steps=3, batch=8, every=2)


def study(
    mechanisms: str = "softmax,uniform",
    lrs: tuple[float, ...] = (1e-3,),
    seeds: tuple[int, ...] = (0,),
    budget: Budget = SHORT,
) -> Study:
    return Study(
        task=parse_spec(TASK, "task"),
        mechanisms=parse_specs(mechanisms, "mechanisms"),
        lrs=lrs,
        seeds=seeds,
        network=SMALL,
        budget=budget,
    )


def trial(config: TrialConfig) -> Trial:
    return run_trial(config, task(config.task.name, **config.task.options), lambda moment: None)


def numbers(result: Trial) -> dict[str, Any]:
    """A trial without what may differ between two runs."""
    return {name: value for name, value in result.plain().items() if name != "seconds"}


# Specs


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("a", {}),
        ("a()", {}),
        (" a ( n = 8 , x = -0.5 ) ", {"n": 8, "x": -0.5}),
        ("a(form=chunk, name='two words', on=True, none=None)",
         {"form": "chunk", "name": "two words", "on": True, "none": None}),
        ("a(kernel=(3, 3), sizes=[1, [2]])", {"kernel": (3, 3), "sizes": (1, (2,))}),
        ("a(inner={'window': 8})", {"inner": {"window": 8}}),
    ],
)  # fmt: skip
def test_spec_text(text: str, options: dict[str, Any]) -> None:
    spec = parse_spec(text, "task")
    assert spec == Spec(name="a", options=options)
    assert parse_spec(spec.label, "task") == spec
    assert Spec.model_validate_json(spec.model_dump_json()) == spec


def test_commas_part_specs_only_outside_parentheses() -> None:
    found = parse_specs("a,b(x=1,y=(2,3)),c(s='p,q')", "mechanisms")
    assert [spec.name for spec in found] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", ",", "a,,b", "a(", "a)", "a b", "a.b", "a-b", "3", "'a'", "lambda: a", "a\0"),
        *("a(3)", "a(*x)", "a(**x)", "a(n=1,n=2)", "a(n=1)(n=2)", "[a]", "a],[b", "a,a", "(" * 500),
        *("a(f=g())", "a(f=1+x)", "a(f=1e999)", "a(f={1: 2})", "a(f=b'x')", "a(f=1j)"),
    ],
)
def test_bad_spec_text(text: str) -> None:
    with pytest.raises(ArgumentError):
        parse_specs(text, "mechanisms")


def test_spec_text_is_not_run() -> None:
    with pytest.raises(ArgumentError, match=r"a\.f: expected a literal"):
        parse_specs("a(f=__import__('os').system('true'))", "mechanisms")


def test_options() -> None:
    assert parse_options(["n=8", "form=chunk"], "option") == {"n": 8, "form": "chunk"}
    for bad in (["n"], ["=3"], ["n="], ["n=1", "n=2"], ["2n=3"], ["n=(1"]):
        with pytest.raises(ArgumentError):
            parse_options(bad, "option")


# Trials


def test_trial_is_a_strict_record(tmp_path: Path) -> None:
    result = trial(study().trials[0])
    path = tmp_path / "trial.json"
    write_json(path, result)
    assert read_record(path, Trial) == result
    text = json.loads(path.read_text())
    assert text["schema"] == "regard.trial/1"
    for change in ({"extra": 1}, {"schema": "regard.trial/2"}, {"test_accuracy": 1.5}):
        path.write_text(json.dumps({**text, **change}))
        with pytest.raises(ArgumentError, match=r"trial\.json: expected a Trial record"):
            read_record(path, Trial)
    text["config"]["network"]["depth"] = 3
    path.write_text(json.dumps(text))
    with pytest.raises(ArgumentError, match=r"network\.depth"):
        read_record(path, Trial)


def test_trial_counts_what_it_did() -> None:
    config = study(budget=Budget(steps=5, batch=8, every=2)).trials[0]
    found = trial(config)
    assert [point.step for point in found.curve] == [2, 4, 5]
    assert found.flops_total == 5 * found.flops_per_step > 0
    assert found.valid_accuracy == found.curve[-1].accuracy
    assert found.status == "spent"
    assert found.state_bytes is not None
    assert found.state_bytes > 2 * 16 * 16 * 4  # keys and values of 16 tokens, width 16, float32
    assert found.hardware.threads == torch.get_num_threads()


def test_attention_products_are_counted() -> None:
    """Twice the tokens more than double the operations of softmax attention."""
    short, long = (
        trial(
            TrialConfig(
                task=Spec(
                    name="recall", options={"vocab": 32, "length": n, "pairs": 2, "examples": 2}
                ),
                mechanism=Spec(name="softmax"),
                network=Network(dim=8, heads=1, layers=1, conv=0),
                budget=Budget(steps=1, batch=2),
                lr=1e-3,
                seed=0,
            )
        ).flops_per_step
        for n in (256, 512)
    )
    products = 3 * 2 * 2 * 8 * 2  # forward and backward, two products, multiply and add, D, B
    assert long - 2 * short > products * (512**2 - 2 * 256**2) / 2


def test_same_config_gives_the_same_numbers_and_leaves_random_state_alone() -> None:
    config = study().trials[0]
    before = torch.random.get_rng_state()
    first = trial(config)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert numbers(trial(config)) == numbers(first)
    other = trial(config.model_copy(update={"seed": 1}))
    assert other.curve[0].loss != first.curve[0].loss


def test_id_is_stable_and_tells_configs_apart() -> None:
    one, two = study(lrs=(1e-3, 2e-3), mechanisms="softmax").trials
    assert one.id != two.id
    assert TrialConfig.model_validate_json(one.model_dump_json()).id == one.id
    tupled = one.model_copy(update={"mechanism": Spec(name="a", options={"k": (3, 3)})})
    assert TrialConfig.model_validate_json(tupled.model_dump_json()).id == tupled.id


def test_solved_task_stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Training, "accuracy", lambda self, split: 0.995)
    found = trial(study(budget=Budget(steps=100, batch=8, every=2)).trials[0])
    assert found.status == "solved"
    assert found.curve[-1].step == found.steps_to_solve == 2


def test_budget_in_minutes_ends() -> None:
    found = trial(study(budget=Budget(minutes=0.01, batch=8)).trials[0])
    assert found.status == "spent"
    assert found.seconds >= 0.6


def test_divergence_is_a_status() -> None:
    found = trial(study(lrs=(1e30,)).trials[0])
    assert found.status == "diverged"
    assert found.curve[-1].loss is None
    assert found.test_accuracy < 0.5
    json.loads(json.dumps(found.plain(), allow_nan=False))


# Comparisons


def test_best_rate_is_chosen_on_validation_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the rejected rate has the better test accuracies, which must not matter."""

    def planted(self: Training, split: str) -> float:
        good = self.config.lr == 2e-3
        seed = self.config.seed / 10
        return {"valid": 0.6 if good else 0.4, "test": (0.3 if good else 0.5) + seed}[split]

    monkeypatch.setattr(Training, "accuracy", planted)
    found = compare(study("softmax", (1e-3, 2e-3), (0, 1)), tmp_path)
    (row,) = found.rows
    assert row.lr == 2e-3
    assert row.lrs == pytest.approx({"0.001": 0.4, "0.002": 0.6})
    assert row.accuracies == pytest.approx((0.3, 0.4))
    assert row.accuracy_mean == pytest.approx(0.35)
    assert row.accuracy_std == pytest.approx(0.05 * 2**0.5)
    assert row.steps_to_99 is None
    assert [curve.seed for curve in row.curves] == [0, 1]


def test_comparison_is_a_strict_record(tmp_path: Path) -> None:
    found = compare(study(), tmp_path, command="regard compare")
    path = tmp_path / "comparison.json"
    assert read_record(path, Comparison) == found
    text = json.loads(path.read_text())
    assert text["schema"] == "regard.comparison/1"
    assert text["task"]["name"] == "recall"
    assert text["rows"][0]["citations"][0]["url"].startswith("https://arxiv.org/abs/")
    text["rows"][0]["surprise"] = 1
    path.write_text(json.dumps(text))
    with pytest.raises(ArgumentError, match=r"rows\.0\.surprise"):
        read_record(path, Comparison)


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    seen: list[Progress] = []
    compare(study(), tmp_path, watch=seen.append)
    done = [moment.done for moment in seen]
    assert done == sorted(done)
    assert (done[0], done[-1], seen[-1].total) == (0, 2, 2)
    seen.clear()
    compare(study(), tmp_path, watch=seen.append)
    assert [moment.done for moment in seen] == [2, 2]


def test_an_interrupted_comparison_goes_on(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.done > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(study(), tmp_path, watch=stop)
    (first,) = (tmp_path / "trials").iterdir()
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "comparison.json").exists()
    assert len(compare(study(), tmp_path).rows) == 2
    assert first.stat().st_mtime_ns == written


def test_a_killed_process_loses_the_running_trial_only(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from regard.cli.main import app; app()", "compare", *FLAGS]
    command += ["--mechanisms", "softmax,uniform", "--seeds", "0,1,2", "--threads", "1"]
    command += ["--lrs", "1e-3", "--out", str(tmp_path / "out")]
    trials = tmp_path / "out" / "trials"
    slow = [*command, "--steps", "20"]
    process = subprocess.Popen(slow, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(trials.glob("*.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in trials.glob("*.json")}
    assert 0 < len(kept) < 6
    (trials / "0123456789abcdef.json.part").write_text("half")
    again = subprocess.run(slow, capture_output=True, text=True, check=True)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list(trials.glob("*.json"))) == 6
    found = read_record(tmp_path / "out" / "comparison.json", Comparison)
    assert [len(row.accuracies) for row in found.rows] == [3, 3]
    assert "report.html" in again.stdout


def test_trials_of_other_versions_are_used_and_told(tmp_path: Path) -> None:
    compare(study(), tmp_path)
    path = next((tmp_path / "trials").iterdir())
    old = read_record(path, Trial)
    versions = Versions(**{**old.versions.plain(), "torch": "1.0"})
    write_json(path, old.model_copy(update={"versions": versions}))
    (note,) = compare(study(), tmp_path).notes
    assert note.startswith("1 of 2 trials were made with torch 1.0, now")


def test_a_task_on_grids(tmp_path: Path) -> None:
    digits = study("softmax").model_copy(update={"task": Spec(name="digits")})
    (row,) = compare(digits, tmp_path).rows
    assert row.state_bytes is None
    assert row.accuracies[0] > 0
    with pytest.raises(ArgumentError, match="conv: expected nothing for the grids of digits"):
        compare(digits.model_copy(update={"network": Network(conv=3)}), tmp_path)


# What is refused, before anything runs


def spoil(out: Path, name: str, content: str) -> None:
    (out / "trials").mkdir(parents=True)
    (out / name).write_text(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trials/notes.txt", "mine"),
        ("trials/0123456789abcdef.json", "not JSON"),
        ("trials/0123456789abcdef.json", "{}"),
        ("comparison.json", '{"schema": "something else"}'),
    ],
)
def test_foreign_results_are_named_and_left_alone(name: str, content: str, tmp_path: Path) -> None:
    spoil(tmp_path, name, content)
    with pytest.raises(ArgumentError, match=name.split("/")[-1]):
        compare(study(), tmp_path, watch=lambda progress: pytest.fail("something ran"))
    assert (tmp_path / name).read_text() == content


def test_a_trial_under_a_wrong_name_is_foreign(tmp_path: Path) -> None:
    compare(study("softmax"), tmp_path)
    (path,) = (tmp_path / "trials").iterdir()
    path.rename(path.with_name("0123456789abcdef.json"))
    with pytest.raises(ArgumentError, match=r"0123456789abcdef\.json"):
        compare(study("softmax"), tmp_path)


def test_out_must_be_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("a file")
    with pytest.raises(ArgumentError, match="out: expected a folder"):
        compare(study(), out)
    with pytest.raises(ArgumentError, match="out: expected a folder"):
        compare(study(), out / "deeper")


def test_a_mechanism_must_serve_the_task(tmp_path: Path) -> None:
    digits = study("softmax,base_conv").model_copy(update={"task": Spec(name="digits")})
    with pytest.raises(UnsupportedError, match="base_conv"):
        compare(digits, tmp_path)
    assert list(tmp_path.iterdir()) == []


# The command


def test_command_prints_a_table_and_writes_everything(tmp_path: Path) -> None:
    out, copy = tmp_path / "out", tmp_path / "copy.json"
    arguments = ["compare", *FLAGS, "--lrs", "1e-3,2e-3", "--seeds", "0,1"]
    arguments += ["--mechanisms", "softmax,sliding_window(window=2,sinks=0)"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out), "--json", str(copy)])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "sliding_window(window=2, sinks=0)" in result.stdout
    assert "±" in result.stdout
    assert str(out / "report.html") in result.stdout
    assert copy.read_text() == (out / "comparison.json").read_text()
    assert "<html" in (out / "report.html").read_text()
    assert len(list((out / "trials").iterdir())) == 8


def test_command_refuses_foreign_results_in_one_line(tmp_path: Path) -> None:
    spoil(tmp_path, "trials/notes.txt", "mine")
    result = CliRunner().invoke(app, ["compare", *FLAGS, "--out", str(tmp_path)])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert str(tmp_path / "trials" / "notes.txt") in line


def test_interrupt_tells_how_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("regard.bench.compare.compare", interrupted)
    result = CliRunner().invoke(app, ["compare", *FLAGS, "--out", str(tmp_path / "out")])
    assert result.exit_code == 130
    assert "the same command resumes" in result.stderr
