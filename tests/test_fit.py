"""`regard fit` and `regard.search`: budgets kept, resumed, refused; the page that shows them."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from subjects import small_pocket
from typer.testing import CliRunner

import regard
from regard.bench.exams import Score
from regard.bench.fit import fit as searched
from regard.bench.fitting import Fit, FitConfig
from regard.bench.lessons import lessons
from regard.bench.record import read_record
from regard.bench.subject import Subject, load
from regard.bench.sweep import Progress
from regard.bench.symbol_exams import SymbolFacts
from regard.cli.main import app
from regard.core.errors import ArgumentError, RegardError, UnsupportedError
from regard.core.passage import Passage
from regard.plan import Plan, PlanError, Step
from regard.report.fit import fit_html
from regard.searchers.fitting import Fitted, decoder_sites, fitted, sensitivity
from regard.searchers.prices import prices
from regard.searchers.refining import Company, concentrated, refined
from regard.searchers.rules import Rule, groups_of, ladder
from regard.tasks.needle import Needle
from regard.testing.tiny import SHAPE, prompt, tiny_decoder, tiny_encoder

transformers = pytest.importorskip("transformers")
pytest.importorskip("scipy")

LENGTH, ROW = 45, 2 * 8 * 8  # tokens; bytes of a key and its value: width 8, float64
SLOT = 4  # bytes of a kept key's place
SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_decoder()


def said(model: Any, ids: torch.Tensor, tokens: int = 3) -> torch.Tensor:
    """What the untouched model goes on with, (B,tokens)."""
    found = ids
    for _ in range(tokens):
        with torch.no_grad():
            found = torch.cat([found, model(found).logits[:, -1:].argmax(-1)], 1)
    return found[:, ids.shape[1] :]


@pytest.fixture(scope="module")
def passages(model: Any) -> tuple[Passage, ...]:
    ids = [prompt(n, batch=3, seed=n) for n in (LENGTH, 64)]
    return tuple(Passage({"input_ids": x}, tokens=x, answer=said(model, x)) for x in ids)


def same(one: Fitted, other: Fitted) -> bool:
    return (one.plan, one.predicted, one.measured, one.cost) == (
        other.plan, other.predicted, other.measured, other.cost,
    )  # fmt: skip


# regard.search


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.8])
def test_the_cache_holds_what_the_budget_allows(
    budget: float, model: Any, passages: tuple[Passage, ...]
) -> None:
    found = regard.search(model, passages, budget, shares=SHARES, rounds=1)
    assert found.cost <= budget
    for passage in passages:
        with found.plan.applied(model) as run, torch.no_grad():
            model(**passage.inputs, use_cache=True)
        report = run.report()
        buckets = [bucket for layer in report["layers"] for bucket in layer["buckets"]]
        keys = sum(3 * bucket["keys"] * len(bucket["heads"]) for bucket in buckets)
        assert keys * ROW <= budget * report["dense_bytes"]
        assert keys * ROW <= report["bytes"] <= keys * (ROW + SLOT)
        assert keys * ROW > 0.5 * budget * report["dense_bytes"], "most of the budget is spent"


def test_a_larger_budget_is_never_worse(model: Any, passages: tuple[Passage, ...]) -> None:
    rules, sites = ladder("spans", SHARES), decoder_sites(model)
    known: dict[str, float] = {}
    found = sensitivity(model, passages, rules, known=known)
    cost = prices(model, sites, groups_of(sites), rules, (LENGTH, 64), "bytes")
    company, smaller, starts = Company(model, passages, found, known), [], []
    for budget in (0.2, 0.35, 0.5, 0.8, 1.0):
        start = fitted(model, found, cost, budget)
        also = [one.choice for one in smaller]
        starts.append(start)
        smaller.append(refined(company, start, cost, budget, rounds=1, also=also))
    assert all(b.predicted <= a.predicted + 1e-12 for a, b in pairwise(starts))
    losses = [one.measured for one in smaller if one.measured is not None]
    assert len(losses) == 5
    assert all(b <= a for a, b in pairwise(losses))
    assert losses[0] > losses[-1] == pytest.approx(0.0, abs=1e-9)
    for budget, start in ((0.35, starts[1]), (0.8, starts[3])):
        tried = [start.choice, concentrated(found, cost, budget), smaller[0].choice]
        one = refined(company, start, cost, budget, rounds=0, also=tried[2:])
        best = min(company.loss(choice) for choice in tried)
        assert one.measured == pytest.approx(best - found.untouched, abs=1e-12)


def test_losses_are_those_of_the_whole_sequence(model: Any, passages: tuple[Passage, ...]) -> None:
    """With all of the cache, what is measured is the loss of one forward."""
    found = regard.search(
        model, passages[:1], 1.0, shares=(0.5, 1.0), rounds=0, known=(known := {})
    )
    assert found.plan.steps == ()
    ids, answer = passages[0].inputs["input_ids"], passages[0].answer
    assert answer is not None
    with torch.no_grad():
        logits = model(torch.cat([ids, answer], 1)).logits[:, LENGTH - 1 : -1]
    loss = F.cross_entropy(logits.float().mT, answer, reduction="none").sum(1).mean()
    assert known["untouched"] == pytest.approx(float(loss), rel=1e-5)


def test_the_same_seedless_search_twice(model: Any, passages: tuple[Passage, ...]) -> None:
    one, other = (regard.search(model, passages, 0.4, shares=SHARES, rounds=1) for _ in range(2))
    assert same(one, other)
    assert one.plan.steps


def test_padding_before_a_prompt_changes_nothing(model: Any, passages: tuple[Passage, ...]) -> None:
    padded = []
    for passage in passages:
        ids = F.pad(passage.inputs["input_ids"], (7, 0), value=5)
        real = F.pad(torch.ones_like(passage.inputs["input_ids"]), (7, 0))
        inputs = {"input_ids": ids, "attention_mask": real}
        padded.append(Passage(inputs, tokens=ids, answer=passage.answer))
    bare, known = {}, {}
    one = regard.search(model, passages, 0.4, shares=SHARES, rounds=0, known=bare)
    other = regard.search(model, padded, 0.4, shares=SHARES, rounds=0, known=known)
    assert one.plan == other.plan
    assert known == pytest.approx(bare, rel=1e-5, abs=1e-6)
    with pytest.raises(ArgumentError, match="budget"):  # five of 45 tokens are more, of 52 less
        regard.search(model, padded, 5 / 48, shares=(1 / 16, 1.0))
    ids = F.pad(passages[0].inputs["input_ids"], (0, 7), value=5)
    mask = F.pad(torch.ones_like(passages[0].inputs["input_ids"]), (0, 7))
    wrong = Passage({"input_ids": ids, "attention_mask": mask}, ids, answer=passages[0].answer)
    with pytest.raises(UnsupportedError, match="padded at its end"):
        regard.search(model, [wrong], 0.4)


def test_an_interrupted_search_goes_on(model: Any, passages: tuple[Passage, ...]) -> None:
    class Counted(dict[str, float]):
        added = 0

        def __setitem__(self, key: str, value: float) -> None:
            Counted.added += 1
            super().__setitem__(key, value)

    def stopping(share: float, what: str) -> None:
        if Counted.added == 5:
            raise KeyboardInterrupt

    known = Counted()
    with pytest.raises(KeyboardInterrupt):
        regard.search(model, passages, 0.4, shares=SHARES, rounds=1, known=known, progress=stopping)
    assert len(known) == Counted.added == 5
    found = regard.search(model, passages, 0.4, shares=SHARES, rounds=1, known=known)
    assert len(known) == Counted.added, "nothing is measured twice"
    assert same(found, regard.search(model, passages, 0.4, shares=SHARES, rounds=1))


def test_the_model_is_as_before(model: Any, passages: tuple[Passage, ...]) -> None:
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    modes: list[bool] = []

    def told(share: float, what: str) -> None:
        modes.append(model.training)

    model.train()
    regard.search(model, passages[:1], 0.5, shares=(0.25, 1.0), rounds=0, progress=told)
    assert model.training
    model.eval()
    assert modes
    assert not any(modes), "it is measured in evaluation mode"
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert model.config._attn_implementation == "sdpa"


def test_a_budget_that_cannot_be_met_says_which_can(
    model: Any, passages: tuple[Passage, ...]
) -> None:
    known: dict[str, float] = {}
    shares = (1 / 16, 1 / 2, 1.0)
    with pytest.raises(ArgumentError, match="budget: expected a part of") as error:
        regard.search(model, passages, 0.01, shares=shares, known=known)
    assert known == {}, "it is refused before anything is measured"
    least = float(re.search(r"part of ([\d.]+) to 1", str(error.value))[1])  # type: ignore[index]
    assert least == pytest.approx(5 / LENGTH, abs=1e-4)  # four sinks and the newest token
    assert regard.search(model, passages, least, shares=shares, rounds=0).cost <= least


@pytest.mark.parametrize("unit", ["tokens", "flops", "latency"])
def test_other_units(
    unit: Any, model: Any, passages: tuple[Passage, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pace(tiny: Any, ids: torch.Tensor) -> float:
        with torch.no_grad():
            cache = tiny(ids, use_cache=True).past_key_values
        return 1.0 + cache.layers[0].keys.shape[2] / ids.shape[1]  # half of it by the keys held

    monkeypatch.setattr("regard.searchers.pacing.decoding_pace", pace)
    found = regard.search(model, passages, 0.9, unit=unit, shares=SHARES, rounds=0)
    assert 0 < found.cost <= 0.9
    with pytest.raises(ArgumentError, match="budget: expected a part of") as error:
        regard.search(model, passages, 0.05, unit=unit, shares=SHARES)
    least = float(re.search(r"part of ([\d.]+) to 1", str(error.value))[1])  # type: ignore[index]
    bounds = {"tokens": (0.1, 0.13), "flops": (0.5, 0.99), "latency": (0.5, 0.6)}
    assert bounds[unit][0] < least < bounds[unit][1]


def test_bad_input_is_refused(model: Any, passages: tuple[Passage, ...]) -> None:
    ids = passages[0].inputs["input_ids"]
    with pytest.raises(ArgumentError, match="passages: expected at least one"):
        regard.search(model, [])
    with pytest.raises(ArgumentError, match="unit: expected one of bytes"):
        regard.search(model, passages, unit="bits")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="input_ids"):
        regard.search(model, [Passage({"inputs_embeds": torch.zeros(1, 9, 32)})])
    with pytest.raises(UnsupportedError, match="no answer"):
        regard.search(model, [Passage({"input_ids": ids}, tokens=ids)])
    with pytest.raises(ArgumentError, match="a decoder"):
        regard.search(tiny_encoder(), passages)


def test_a_plan_is_refused_by_another_model(model: Any, passages: tuple[Passage, ...]) -> None:
    found = regard.search(model, passages[:1], 0.5, shares=(0.25, 1.0), rounds=0)
    config = transformers.LlamaConfig(**{**SHAPE, "num_hidden_layers": 2}, num_key_value_heads=2)
    with (
        pytest.raises(PlanError, match="made_for"),
        found.plan.applied(transformers.LlamaForCausalLM(config)),
    ):
        pass


# The command's search, on a model whose answers need not be right


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject("pocket", *small_pocket())


def pass_all(patch: pytest.MonkeyPatch) -> None:
    """Scores of an untrained model pass for those of one that can do its task."""
    patch.setattr(Score, "at_chance", property(lambda score: False))


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    pass_all(monkeypatch)


def config(**changes: Any) -> FitConfig:
    settings = {
        "budget": 0.4, "lengths": (160,), "examples": 2, "exams": 2, "rounds": 1,
        "shares": (1 / 8, 1 / 2, 1.0), "tokens": 2, "seconds": 0.0,
    }  # fmt: skip
    return FitConfig.model_validate(settings | changes)


@pytest.fixture(scope="module")
def done(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> tuple[Fit, Path]:
    out = tmp_path_factory.mktemp("fit")
    with pytest.MonkeyPatch.context() as patch:
        pass_all(patch)
        return searched(config(), subject, out), out


def test_a_fit_keeps_its_plan_and_its_proof(done: tuple[Fit, Path], subject: Subject) -> None:
    found, out = done
    assert read_record(out / "fit.json", Fit) == found
    plan = Plan.load(out / "plan.json")
    assert plan.model_dump(mode="json", exclude_defaults=True) == found.plan
    rows = found.evaluation.rows
    labels = ["dense", "fitted 0.4", "uniform 0.4", "recent only 0.4", "random 0.4", "snapkv 0.4"]
    assert [row.label for row in rows][:6] == labels
    assert rows[1].plan == found.plan
    assert found.cost <= 0.4
    assert {(g.layer, g.kv_head) for g in found.groups} == {
        (i, j) for i in range(3) for j in (0, 1)
    }
    kept = sum(
        Rule(None if g.share == 1 else "stream", {}, g.share, 5).kept(160) for g in found.groups
    )
    assert kept / (6 * 160) == pytest.approx(found.cost)
    assert all(set(g.metrics) >= {"induction", "local"} for g in found.groups)


def test_a_fit_is_the_same_again(
    done: tuple[Fit, Path], able: None, subject: Subject, tmp_path: Path
) -> None:
    again = searched(config(), subject, tmp_path)
    assert again.plan == done[0].plan
    assert again.groups == done[0].groups
    assert (again.predicted, again.measured) == (done[0].predicted, done[0].measured)
    scores = [row.scores for row in again.evaluation.rows]
    assert scores == [row.scores for row in done[0].evaluation.rows]


def test_an_interrupted_fit_measures_only_what_is_missing(
    done: tuple[Fit, Path], able: None, subject: Subject, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from regard.searchers import answering

    measured: list[Any] = []

    def counting(*given: Any) -> float:
        measured.append(given)
        return answering.mean_loss(*given)

    for place in ("fitting", "refining"):
        monkeypatch.setattr(f"regard.searchers.{place}.mean_loss", counting)

    def stopping(moment: Progress) -> None:
        if len(measured) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searched(config(), subject, tmp_path, watch=stopping)
    assert len(measured) == 4
    found = searched(config(), subject, tmp_path)
    (ledger,) = (tmp_path / "losses").iterdir()
    assert len(json.loads(ledger.read_text())["losses"]) == len(measured), "each loss once"
    assert found.groups == done[0].groups
    before = len(measured)
    searched(config(), subject, tmp_path)
    assert len(measured) == before


def test_impossible_budgets_are_refused_before_anything_runs(
    able: None, subject: Subject, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=r"a part of 0\.1250 to 1"):
        searched(
            config(budget=0.1), subject, tmp_path, watch=lambda moment: pytest.fail("it ran")
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


# The command


def test_a_task_at_chance_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("regard.pocket.language", small_pocket)
    result = CliRunner().invoke(
        app, ["fit", "--length", "160", "--exams", "8", "--examples", "2", "--no-progress"]
    )
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert "task: expected one the untouched model can do" in line
    assert "needle at 160 tokens" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--budget", "0"), "budget: expected greater than 0"),
        (("--budget", "0.001"), "budget: expected a part of"),
        (("--unit", "bits"), "unit: expected 'bytes'"),
        (("--task", "chess"), "task: expected 'needle'"),
        (("--length", "160,160"), "length: expected each one once"),
        (("./nowhere",), "MODEL: expected an existing folder"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("regard.pocket.language", small_pocket)
    result = CliRunner().invoke(app, ["fit", "--no-progress", *arguments])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert told in line
    assert list(tmp_path.iterdir()) == []


def test_command_prints_what_it_writes(
    able: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("regard.pocket.language", small_pocket)
    monkeypatch.setattr("regard.cli.fit.Fit._config", lambda self: config(task="perplexity"))
    result = CliRunner().invoke(app, ["fit", "--out", "found", "--no-progress"])
    assert result.exit_code == 0, result.output
    found = json.loads(Path("found/fit.json").read_text())
    assert Path("found/report.html").read_text() == fit_html(found)
    for group in found["groups"]:
        assert f"{100 * group['share']:.1f}\u202f%" in result.stdout
    assert "report: found/report.html" in result.stdout
    assert "has perplexity" in Path("found/report.html").read_text()


def test_interrupt_tells_how_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("regard.pocket.language", small_pocket)
    monkeypatch.setattr("regard.bench.fit.fit", interrupted)
    result = CliRunner().invoke(app, ["fit", "--no-progress"])
    assert result.exit_code == 130
    assert "finished parts are in runs/fit, the same command resumes" in result.stderr


# The page


def test_page_shows_every_number(done: tuple[Fit, Path]) -> None:
    found, page = done[0], fit_html(done[0].plain())
    assert page.count('data-chart="needle-160"') == 2
    assert page.count('data-chart="needle-160-seconds"') == 2
    for group in found.groups:
        assert f'id="L{group.layer}.K{group.kv_head}"' in page
        assert f'href="#L{group.layer}.K{group.kv_head}"' in page
        assert f'data-value="{group.rises[0]}"' in page
    for row in found.evaluation.rows:
        assert f'data-value="{row.cache_bytes}"' in page
    text = re.search(r'id="plan-text"[^>]*>(.*?)</pre>', page, re.DOTALL)
    assert text is not None
    assert json.loads(text[1].replace("&#34;", '"')) == found.plan
    assert "40\u202f% of the cache&#39;s bytes" in page


def test_page_tells_who_keeps_what(done: tuple[Fit, Path]) -> None:
    record = done[0].plain()
    for row, value in zip(record["evaluation"]["rows"], (1.0, 0.97, 0.4, 0.3, 0.2, 0.9)):  # noqa: B905 (the rest stays)
        row["scores"]["needle"] |= {"value": value, "low": value, "high": value}
    page = fit_html(record).replace("\u202f", " ")
    assert "the fitted plan scores 97.0 %" in page
    assert "of which the plan keeps 97.0 %" in page
    assert "uniform 40.0 %" in page
    assert "snapkv 90.0 %" in page


def test_page_is_inert_and_needs_no_network(done: tuple[Fit, Path]) -> None:
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    record = done[0].plain()
    evaluation = record["evaluation"]
    evaluation["command"] = evaluation["subject"]["name"] = hostile
    evaluation["rows"][1]["label"] = f"{hostile} 0.4"
    record["notes"] = [hostile]
    record["plan"]["name"] = record["config"]["unit"] = record["config"]["file"] = hostile
    record["groups"][0]["rule"] = hostile
    record["groups"][0]["metrics"] = {hostile: 0.9}
    page = fit_html(record)
    assert page.count("<script") == 1
    assert "<img" not in page
    assert "&lt;img" in page
    assert 'Content-Security-Policy" content="default-src &#39;none&#39;' in page
    assert not re.search(r"(src|href)=\"(?!#|data:,)", page)


def test_unknown_records_are_refused(done: tuple[Fit, Path]) -> None:
    record = done[0].plain()
    with pytest.raises(ArgumentError, match=r"fit\.schema"):
        fit_html(record | {"schema": "regard.fit/2"})
    with pytest.raises(ArgumentError, match=r"fit\.groups"):
        fit_html(record | {"groups": []})
    groups = [group | {"rises": [0.0]} for group in record["groups"]]
    with pytest.raises(RegardError, match="as many rises as there are shares"):
        fit_html(record | {"groups": groups})


# What it is for


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_quarter_of_the_bytes_keeps_the_needle_where_uniform_does_not(seed: int) -> None:
    """So many questions that one more or less does not decide."""
    model, exam = load("pocket").model, SymbolFacts(Needle(1024, examples=384), seed)
    found = regard.search(model, lessons(exam, 48), 0.25)
    even = Step(treatment="stream", options={"sinks": 4, "budget": 0.25}, layers="all")
    plans = (None, found.plan, Plan(steps=(even,)))
    dense, plan, uniform = (exam.score(model, plan).value or 0.0 for plan in plans)
    assert found.cost <= 0.25
    assert plan >= 0.98 * dense
    assert uniform < 0.98 * dense


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", SEEDS)
def test_questions_after_the_prompt_are_answered_where_no_uniform_plan_can(seed: int) -> None:
    """Nobody can vote for what is not asked yet."""
    model, exam = load("pocket").model, SymbolFacts(Needle(1024, examples=96), seed, later=True)
    found = regard.search(model, lessons(exam, 48), 0.3)
    assert found.cost <= 0.3
    uniform = (("stream", {"sinks": 4}), ("stream", {"sinks": 0}), ("snapkv", {"window": 8}))
    plans = [Plan(steps=(Step(treatment=t, options={**o, "budget": 0.3}),)) for t, o in uniform]
    dense, own, *others = (exam.score(model, p).value or 0.0 for p in (None, found.plan, *plans))
    assert own >= 0.98 * dense
    assert max(others) < 0.5 * dense
