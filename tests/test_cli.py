"""The command line: what each verb prints, and how its errors end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import regard
from regard.cli.main import app
from regard.core.catalog import cards
from regard.report.pattern import measure_pattern


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def failure(*arguments: str) -> str:
    """The one line on standard error of a command that must fail."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("verb", ["list", "info", "show", "compare", "evaluate", "fit", "env"])
def test_help_of_every_verb_has_an_example(verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert f"Example: regard {verb}" in " ".join(result.stdout.split())


def test_version() -> None:
    assert run("--version").stdout == f"regard {regard.__version__}\n"


def test_list_shows_every_card_and_filters() -> None:
    everything = run("list").stdout
    assert all(name in everything for name in cards())
    scored = json.loads(run("list", "--json", "--family", "scored", "--grid", "2").stdout)
    assert {"softmax", "uniform"} <= {card["name"] for card in scored}
    assert all(card["family"] == "scored" and 2 in card["grids"] for card in scored)
    causal = json.loads(run("list", "--json", "--pattern", "causal self").stdout)
    assert {card["name"] for card in causal} == {n for n, card in cards().items() if card.causal}


def test_json_of_cards_holds_what_they_say() -> None:
    (found,) = (c for c in json.loads(run("list", "--json").stdout) if c["name"] == "uniform")
    card = cards()["uniform"]
    assert found["evidence"] == card.evidence
    assert found["papers"][0]["url"] == card.papers[0].url
    assert found["claim"]["command"] == card.claim.command
    assert found["formula"] == card.doc


def test_info_tells_formula_papers_options_and_claim() -> None:
    card = cards()["sliding_window"]
    told = run("info", "sliding_window").stdout
    assert card.doc in told
    assert all(paper.url in told for paper in card.papers)
    assert "window: int = 256" in told
    assert card.claim.command in told


@pytest.mark.parametrize("name", sorted(cards()))
def test_info_of_every_card(name: str) -> None:
    assert run("info", name).exit_code == 0
    assert json.loads(run("info", name, "--json").stdout)["name"] == name


@pytest.mark.parametrize("name", sorted(cards()))
def test_pattern_of_every_card_is_measured(name: str) -> None:
    pattern = measure_pattern(cards()[name], {})
    assert pattern.weights.isfinite().all()
    assert pattern.weights.any(), "nothing is read from anywhere"
    if pattern.causal:
        assert not pattern.weights.triu(1).any(), "the future is read"


def test_pattern_of_uniform_attention_is_the_mean_over_the_past() -> None:
    pattern = measure_pattern(cards()["uniform"], {}, (7,))
    expected = torch.ones(7, 7).tril() / torch.arange(1, 8)[:, None]
    torch.testing.assert_close(pattern.weights, expected.expand(4, 7, 7))


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_show_draws_a_picture(suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"window.{suffix}"
    result = run("show", "sliding_window", "--option", "window=2", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out)
    start = {"png": b"\x89PNG", "svg": b"<?xml"}[suffix]
    assert out.read_bytes().startswith(start)


def test_env_tells_versions_and_hardware() -> None:
    found = json.loads(run("env", "--json").stdout)
    assert found["regard"] == regard.__version__
    assert {"python", "torch", "numpy", "cores", "threads", "memory_gib", "blas", "sdpa"} <= (
        set(found)
    )
    assert "regard" in run("env").stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("info", "sofmax"), "unknown mechanism 'sofmax'; did you mean softmax"),
        (("list", "--family", "score"), "did you mean scored?"),
        (("list", "--grid", "4"), "unknown grid '4'"),
        (("show", "softmax", "--out", "x.pdf"), "out: expected a file that ends in .png or .svg"),
        (("show", "softmax", "--option", "window=3"), "unknown option of softmax 'window'"),
        (("show", "sliding_window", "--option", "window=a"), "options: expected values the mech"),
        (("show", "softmax", "--option", "window"), "option: expected name=value, got 'window'"),
        (("show", "softmax", "--length", "0"), "grid: expected"),
        (("show", "softmax", "--length", "9999"), "grid: expected at most 512 tokens"),
        (("show", "softmax", "--length", "4", "--grid", "2x2"), "length, grid: expected at most"),
        (("show", "softmax", "--grid", "2xb"), "grid: expected sides such as 6x6"),
        (("show", "sliding_window", "--grid", "3x3"), "grid: expected"),
        (("compare", "--mechanisms", "sofmax"), "did you mean softmax"),
        (("compare", "--mechanisms", ""), "mechanisms: expected name or name(option=value"),
        (("compare", "--mechanisms", "softmax,softmax"), "mechanisms: expected each one once"),
        (("compare", "--mechanisms", "softmax(window=3)"), "unknown option of softmax 'window'"),
        (("compare", "--mechanisms", "softmax(3)"), "mechanisms: expected name or name("),
        (("compare", "--mechanisms", "softmax(impl=open('x'))"), "softmax.impl: expected a lit"),
        (
            ("compare", "--mechanisms", "softmax(impl=sparse)"),
            "got sparse (in softmax(impl='sparse'))",
        ),
        (("compare", "--mechanisms", "sliding_window(window=0)"), "Window.size: expected at least"),
        (("compare", "--mechanisms", "sliding_window(window=a)"), "sliding_window(window='a')"),
        (("compare", "--task", "recal"), "unknown task 'recal'; did you mean recall?"),
        (("compare", "--task", "recall(pair=3)"), "did you mean pairs?"),
        (("compare", "--task-option", "pairs=999"), "pairs: expected"),
        (("compare", "--task", "recall(pairs=2)", "--task-option", "pairs=3"), "pairs twice"),
        (("compare", "--steps", "3", "--minutes", "1"), "steps, minutes: expected at most one"),
        (("compare", "--minutes", "nan"), "minutes: expected a finite number"),
        (("compare", "--minutes", "-1"), "minutes: expected greater than 0"),
        (("compare", "--steps", "0"), "steps: expected greater than 0, got 0"),
        (("compare", "--dim", "0"), "dim: expected greater than 0"),
        (("compare", "--heads", "3"), "heads: expected a divisor of dim=64"),
        (("compare", "--lrs", ""), "lrs: expected"),
        (("compare", "--lrs", "fast"), "lrs: expected numbers separated by commas, got 'fast'"),
        (("compare", "--lrs", "1e-3,0"), "lrs.1: expected greater than 0"),
        (("compare", "--lrs", "nan"), "lrs.0: expected"),
        (("compare", "--seeds", ","), "seeds: expected"),
        (("compare", "--seeds", "1,1"), "seeds: expected each value once"),
        (("compare", "--json", "nowhere/x.json"), "json: expected a file in an existing folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in failure(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert "pip install 'regard[plot]'" in failure(
        "show", "softmax", "--out", str(tmp_path / "x.png")
    )


@pytest.mark.parametrize("name", ["sinks", "scan_and_snap", "amp", "minilm", "dictionary"])
def test_info_on_cards_of_other_kinds(name: str) -> None:
    run = CliRunner().invoke(app, ["info", name])
    assert run.exit_code == 0, run.output
    assert run.output.startswith(f"{name}: ")
    record = json.loads(CliRunner().invoke(app, ["info", name, "--json"]).output)
    assert record["papers"]
    assert record["claim"]["command"] in run.output
