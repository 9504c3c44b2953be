"""`regard evaluate`: its numbers against direct computation, its folder, its table and page."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from subjects import KEY_BYTES, Rule, byte_tokenizer, saved_model, small_llama, small_pocket
from torch import Tensor
from typer.testing import CliRunner, Result

from regard.bench.evaluate import evaluate
from regard.bench.evaluation import Evaluation, Inquiry, Named, named_plans
from regard.bench.exams import Score, wilson
from regard.bench.lessons import APART, lessons
from regard.bench.record import read_record
from regard.bench.subject import Subject, load, skeleton
from regard.bench.symbol_exams import SymbolFacts
from regard.bench.text_exams import Passages, TextFacts
from regard.cli.evaluate import evaluation_table
from regard.cli.main import app
from regard.core.errors import ArgumentError, RegardError
from regard.plan import Plan, PlanError, Step, signature
from regard.report.evaluation import evaluation_html
from regard.tasks.needle import Needle
from regard.tasks.task import IGNORED
from regard.tasks.vocabulary import ASK

pytest.importorskip("transformers")
LENGTH = 160


def plan(treatment: str, **options: Any) -> Plan:
    return Plan(steps=(Step(treatment=treatment, options=options),))


SNAPKV = Named(label="snapkv", plan=plan("snapkv", budget=0.25, window=8))
STREAM = Named(label="stream", plan=plan("stream", budget=0.25))
HALF = Named(label="half", plan=plan("stream", budget=0.5))
NEUTRAL = Named(label="neutral", plan=plan("snapkv", budget=1.0))
FAR = Named(
    label="far",
    plan=Plan(steps=(Step(treatment="stream", options={"recent": 4}, layers="9-"),)),
)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject("pocket", *small_pocket())


def inquiry(*plans: Named, **options: Any) -> Inquiry:
    settings = {"lengths": (LENGTH,), "examples": 2, "tokens": 3, "seconds": 0.0, **options}
    return Inquiry(plans=plans, **settings)


# Scores


def said_after(read: Tensor, reach: int) -> int:
    """What follows the last token where it stood before, as far back as `reach` tokens; for an
    answer's first symbol, the token before it must be no question.
    """
    known = read[-reach:-1].tolist()
    for place in range(len(known) - 1, 0, -1):
        if known[place] == int(read[-1]) and known[place - 1] != ASK and place + 1 < len(known):
            return known[place + 1]
    return 0


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("asked", [1, 4])
def test_a_model_that_looks_facts_up_answers_all(asked: int, later: bool) -> None:
    exam = SymbolFacts(Needle(LENGTH, facts=4, asked=asked, examples=11), seed=0, later=later)
    score = exam.score(Rule(lambda read: said_after(read, LENGTH)), None)
    assert (score.right, score.asked, score.value) == (11 * asked, 11 * asked, 1.0)
    assert not score.at_chance


def test_a_model_that_forgets_answers_what_stood_in_reach() -> None:
    task = Needle(LENGTH, facts=4, examples=24)
    score = SymbolFacts(task, seed=3).score(Rule(lambda read: said_after(read, 80)), None)
    near = sum(
        int((question.place - 1 >= question.prompt.shape[1] - 80).sum())
        for question in task.questions("test", 8, seed=3)
    )
    assert 0 < near < 24
    assert abs((score.right or 0) - near) <= 1  # a fact at the edge may be cut


def numbers_said(text: str) -> str:
    """What a reader of text goes on with: the number that stood after the same words."""
    asked = re.findall(r"\nThe pass key(?: of \w+)? is[ \d]*$", text)
    if not asked:
        return "."
    words = asked[-1]
    head, typed = re.fullmatch(r"(\nThe pass key.* is)([ \d]*)", words).groups()  # type: ignore[union-attr]
    number = re.search(re.escape(head) + r"( \d+)\.\n", text)[1]  # type: ignore[index]
    return number[len(typed)] if len(typed) < len(number) else "."


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("facts", [1, 4])
def test_numbers_in_text_are_planted_asked_and_marked(facts: int, later: bool) -> None:
    reader = Subject("bytes", small_llama(257), byte_tokenizer())
    exam = TextFacts(reader, 400, facts, examples=9, seed=0, later=later)

    def rule(read: Tensor) -> int:
        return reader.plain(numbers_said(reader.decode(read[1:].tolist())))[0]

    found = exam.score(Rule(rule, 257), None)
    assert (found.right, found.asked) == (9 * facts, 9 * facts)
    always = exam.score(Rule(lambda read: reader.plain("7")[0], 257), None)
    assert always.right == 0
    assert always.at_chance
    for interview in exam.interviews():
        asks = sum(ask.shape[1] for ask in interview.asks) + facts * interview.count
        assert interview.text.shape[1] + asks == 400
        assert interview.prompt.shape[1] == interview.text.shape[1] + (
            0 if later else interview.asks[0].shape[1]
        )
        assert (interview.prompt[:, 0] == 256).all()


@pytest.mark.parametrize("later", [False, True])
def test_lessons_end_where_the_prompts_do(later: bool) -> None:
    """And score nothing but the answers."""
    reader = Subject("bytes", small_llama(257), byte_tokenizer())
    symbols = SymbolFacts(Needle(LENGTH, facts=4, asked=2, examples=3), 0, later)
    text = TextFacts(reader, 400, 4, examples=3, seed=0, later=later)
    for exam in (symbols, text):
        (shown,), (asked,) = lessons(exam, 3), exam.interviews()
        assert shown.tokens is not None
        assert shown.answer is not None
        assert shown.scored is not None
        assert shown.tokens.shape == asked.prompt.shape
        ask = asked.asks[0].shape[1] if later else 0
        first = shown.scored.int().argmax(1)
        assert (first == ask).all()
        if exam is text:
            told = reader.decode(shown.answer[0][shown.scored[0]].tolist())
            assert re.fullmatch(r" \d{5}", told)
            assert told in reader.decode(shown.tokens[0].tolist())
        else:
            assert int(shown.scored[0].sum()) == 2 * exam.task.value
            whole = torch.cat([shown.tokens, shown.answer], 1)
            (batch,) = replace(exam.task, examples=3).batches("valid", 8, exam.seed + APART)
            assert whole[:, :-1].equal(batch.inputs)
            assert shown.scored.equal(batch.targets[:, shown.tokens.shape[1] - 1 :] != IGNORED)


def test_perplexity_through_the_cache_is_that_of_one_forward(subject: Subject) -> None:
    exam = Passages(subject, 48, examples=9)
    found, loss = exam.score(subject.model, None), 0.0
    with torch.no_grad():
        for inputs, targets in exam.passages():
            logits = subject.model(inputs).logits[:, 23:]
            loss += float(F.cross_entropy(logits.mT, targets[:, 23:], reduction="sum"))
    assert found.asked == 9 * 25
    assert found.value == pytest.approx(math.exp(loss / found.asked), rel=1e-5)


def test_perplexity_under_a_plan_is_that_of_hidden_keys(subject: Subject) -> None:
    exam = Passages(subject, 48, examples=2)
    found = exam.score(subject.model, STREAM.plan)
    inputs, targets = next(exam.passages())
    losses = []
    with STREAM.plan.applied(subject.model, masked_only=True), torch.no_grad():
        out = subject.model(inputs[:, :24], use_cache=True)
        for step in range(24, 49):
            losses.append(F.cross_entropy(out.logits[:, -1], targets[:, step - 1]))
            token = inputs[:, step : step + 1]
            if step < 48:
                out = subject.model(token, past_key_values=out.past_key_values, use_cache=True)
    assert found.value == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-4)
    assert found.value != pytest.approx(exam.score(subject.model, None).value, rel=1e-6)


def test_intervals() -> None:
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(64, 64) == pytest.approx((0.9434, 1.0), abs=1e-4)
    assert wilson(0, 8)[0] == 0.0


def test_a_model_without_numbers_has_no_perplexity(subject: Subject) -> None:
    broken = small_llama()
    broken.lm_head.weight.data.fill_(float("nan"))
    found = Passages(Subject("x", broken, subject.text), 16, examples=1).score(broken, None)
    assert found.value is None
    assert found.at_chance


# The whole


@pytest.fixture(scope="module")
def done(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    out = tmp_path_factory.mktemp("evaluation")
    return evaluate(inquiry(SNAPKV, STREAM, NEUTRAL), subject, out), out


def test_rows_hold_what_direct_computation_gives(
    done: tuple[Evaluation, Path], subject: Subject
) -> None:
    dense, snapkv, stream, neutral = done[0].rows
    assert [row.label for row in done[0].rows] == ["dense", "snapkv", "stream", "neutral"]
    assert dense.cache_bytes == KEY_BYTES * (LENGTH + 1)
    assert (dense.budget, dense.compression_ratio) == (1.0, 0.0)
    assert neutral.cache_bytes == dense.cache_bytes
    assert neutral.scores == dense.scores
    prompt = torch.ones(1, LENGTH, dtype=torch.long)
    for row, named in ((snapkv, SNAPKV), (stream, STREAM)):
        with named.plan.applied(subject.model) as run, torch.no_grad():
            cache = subject.model(prompt, use_cache=True).past_key_values
            subject.model(prompt[:, :1], past_key_values=cache, use_cache=True)
        assert row.cache_bytes == run.report()["bytes"]
        assert row.budget == row.cache_bytes / dense.cache_bytes < 0.35
        assert row.budget + row.compression_ratio == pytest.approx(1)
        expected = Passages(subject, LENGTH, 1).score(subject.model, named.plan)
        assert row.scores["perplexity"] == expected
        assert row.plan == named.plan.model_dump(mode="json", exclude_defaults=True)
    for row in done[0].rows:
        assert row.decode_seconds.rounds >= 3
        assert row.prefill_seconds.median > 0


def test_the_model_is_as_before(done: tuple[Evaluation, Path], subject: Subject) -> None:
    assert subject.model.config._attn_implementation == "sdpa"
    assert subject.record() == done[0].subject


def test_notes_tell_chance_and_unequal_bytes(
    done: tuple[Evaluation, Path], subject: Subject, tmp_path: Path
) -> None:
    notes = " ".join(done[0].notes)
    assert "at chance at needle" in notes
    assert "do not hold the same bytes" in notes
    same = evaluate(inquiry(SNAPKV, STREAM, tasks=("perplexity",)), subject, tmp_path)
    assert not any("bytes" in note for note in same.notes)
    assert "needle" in done[0].rows[0].at_chance


def test_nothing_is_measured_twice(done: tuple[Evaluation, Path], subject: Subject) -> None:
    moments: list[Any] = []
    again = evaluate(inquiry(SNAPKV, STREAM, NEUTRAL), subject, done[1], watch=moments.append)
    assert [(m.done, m.total) for m in moments] == [(13, 13)]
    assert again == done[0] == read_record(done[1] / "evaluation.json", Evaluation)


def test_an_interrupted_evaluation_goes_on(subject: Subject, tmp_path: Path) -> None:
    asked = inquiry(STREAM, tasks=("needle", "perplexity"))

    def stopping(moment: Any) -> None:
        if moment.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(asked, subject, tmp_path, watch=stopping)
    assert len(list((tmp_path / "sheets").iterdir())) == 3
    moments: list[Any] = []
    evaluate(asked, subject, tmp_path, watch=moments.append)
    assert [(m.done, m.what) for m in moments[:-1]] == [
        (3, f"stream, perplexity at {LENGTH}"),
        (4, f"costs at {LENGTH}"),
    ]
    moments.clear()
    evaluate(inquiry(HALF, STREAM, tasks=("needle",)), subject, tmp_path, watch=moments.append)
    assert [m.what for m in moments[:-1]] == [f"half, needle at {LENGTH}", f"costs at {LENGTH}"]


def test_another_model_is_another_result(subject: Subject, tmp_path: Path) -> None:
    asked = inquiry(STREAM, tasks=("perplexity",))
    first = evaluate(asked, subject, tmp_path)
    other = Subject("pocket", *small_pocket())
    other.model.lm_head.weight.data.mul_(0.5)
    second = evaluate(asked, other, tmp_path)
    assert second.rows[0].scores != first.rows[0].scores


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": (64,)}, "length: expected at least 144"),
        ({"lengths": (4096,)}, "length: expected at most 2045"),
        ({"file": "nowhere.txt"}, "file: expected"),
        ({"plans": (STREAM, STREAM)}, "each one once"),
        ({"plans": (Named(label="dense", plan=STREAM.plan),)}, "each one once"),
        ({"plans": (FAR,)}, r"steps\[0\]\.layers"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_runs(
    change: dict[str, Any], message: str, subject: Subject, tmp_path: Path
) -> None:
    with pytest.raises((RegardError, ValueError), match=message):
        evaluate(
            inquiry(*change.pop("plans", (STREAM,)), **change), subject, tmp_path,
            watch=lambda moment: pytest.fail("something ran"),
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_foreign_results_are_named_and_left_alone(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "sheets").mkdir()
    (tmp_path / "sheets" / "notes.txt").write_text("mine")
    with pytest.raises(ArgumentError, match=r"notes\.txt"):
        evaluate(inquiry(STREAM), subject, tmp_path)
    assert (tmp_path / "sheets" / "notes.txt").read_text() == "mine"


def test_plans_are_called_by_their_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    paths = [tmp_path / "x.json", tmp_path / "a" / "x.json", tmp_path / "y.json"]
    for path in paths:
        STREAM.plan.save(path)
    assert [n.label for n in named_plans(paths)] == [str(paths[0]), str(paths[1]), "y"]
    paths[2].write_text("{}")
    with pytest.raises(PlanError) as error:
        named_plans(paths)
    assert str(paths[2]) in error.value.__notes__[0]


# Models in folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("model"))


def test_a_folder_is_a_model(folder: Path) -> None:
    loaded = load(str(folder))
    assert not loaded.symbols
    assert loaded.encode("é") == [256, *loaded.plain("é")]
    assert loaded.decode(loaded.plain("né.")) == "né."
    assert str(folder) not in loaded.record().model_dump_json()
    bare = skeleton(str(folder))
    assert signature(bare) == signature(loaded.model)
    assert all(weight.is_meta for weight in bare.parameters())


@pytest.mark.parametrize(("name", "told"), [("./none", "existing folder"), ("/none", "existing")])
def test_models_that_are_not_there(name: str, told: str) -> None:
    with pytest.raises(ArgumentError, match=f"MODEL: expected an {told}"):
        load(name)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="MODEL"):
        load(str(tmp_path))
    with pytest.raises(ArgumentError, match="MODEL"):
        skeleton(str(tmp_path))


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ArgumentError, match="safetensors"):
        load(str(tmp_path))


# The command


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("regard.pocket.language", small_pocket)
    SNAPKV.plan.save("snapkv.json")
    STREAM.plan.save("stream.json")
    return tmp_path


def test_command_prints_what_it_writes(workplace: Path, folder: Path) -> None:
    result = run(
        "evaluate", str(folder), "--plan", "snapkv.json", "--plan", "stream.json",
        "--task", "needle,perplexity", "--length", "96,128", "--examples", "2",
        "--tokens", "2", "--seconds", "0", "--out", "runs", "--no-progress",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = read_record(workplace / "runs" / "evaluation.json", Evaluation)
    assert [(r.label, r.length) for r in found.rows] == [
        (label, n) for n in (96, 128) for label in ("dense", "snapkv", "stream")
    ]
    lines = [line.split("│") for line in result.stdout.splitlines() if "KiB" in line]
    cells = [[cell.strip().replace("\u202f", " ") for cell in line[1:-1]] for line in lines]
    for row, line in zip(found.rows, cells, strict=True):
        assert line[0] == row.label
        assert line[1] == str(row.length)
        assert line[2].startswith(f"{100 * (row.scores['needle'].value or 0):.1f} %")
        assert line[3].split()[0] == f"{row.scores['perplexity'].value:.3g}"
        assert line[4] == f"{row.cache_bytes / 1024:.3g} KiB"
        assert line[5] == f"{100 * row.budget:.1f} %"
        assert line[6] == f"{100 * row.compression_ratio:.1f} %"
    assert "at chance" in result.stdout
    page = (workplace / "runs" / "report.html").read_text()
    assert page == evaluation_html(json.loads((workplace / "runs" / "evaluation.json").read_text()))


def test_command_on_the_pocket_model(workplace: Path) -> None:
    result = run(
        "evaluate", "--plan", "stream.json", "--task", "recall", "--length", "160",
        "--examples", "1", "--tokens", "1", "--seconds", "0", "--no-progress",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = read_record(workplace / "runs" / "evaluate" / "evaluation.json", Evaluation)
    assert found.rows[0].scores["recall"].asked == 16
    assert found.subject.name == "pocket"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "plan: expected at least one --plan FILE"),
        (("--plan", "none.json"), "plan: expected a JSON file, got none.json"),
        (("--plan", "stream.json", "--plan", "stream.json"), "plan: expected each one once"),
        (("--plan", "stream.json", "--task", "neddle"), "did you mean needle?"),
        (("--plan", "stream.json", "--task", ","), "task: expected some of needle"),
        (("--plan", "stream.json", "--length", "many"), "length: expected numbers of tokens"),
        (("--plan", "stream.json", "--length", "0"), "lengths.0: expected greater than 0"),
        (("--plan", "stream.json", "--examples", "0"), "examples: expected greater than 0"),
        (("--plan", "stream.json", "--device", "tpu9"), "device: expected a device"),
        (("./nowhere", "--plan", "stream.json"), "MODEL: expected an existing folder"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], told: str, workplace: Path) -> None:
    before = sorted(workplace.iterdir())
    result = run("evaluate", *arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert told in line
    assert sorted(workplace.iterdir()) == before


# The page


def test_page_is_inert_and_needs_no_network(done: tuple[Evaluation, Path]) -> None:
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    record = done[0].plain()
    record["command"] = record["subject"]["name"] = hostile
    record["notes"] = [hostile]
    record["rows"][1]["label"] = hostile
    record["rows"][1]["plan"]["steps"][0]["modules"] = hostile
    page = evaluation_html(record)
    assert page.count("<script") == 1
    assert "<img" not in page
    assert 'Content-Security-Policy" content="default-src &#39;none&#39;' in page
    assert not re.search(r"(src|href)=\"(?!#|data:,)", page)


def test_page_shows_every_number(done: tuple[Evaluation, Path]) -> None:
    page = evaluation_html(done[0].plain())
    for row in done[0].rows:
        assert f'data-value="{row.cache_bytes}"' in page
        assert f'data-value="{row.scores["perplexity"].value}"' in page
    assert page.count('data-chart="needle-160"') == 2
    assert "The untouched model is at chance at needle." in page


def test_finding_tells_who_keeps_quality(done: tuple[Evaluation, Path]) -> None:
    record = done[0].plain()
    for row, value in zip(record["rows"], (1.0, 0.97, 0.4, 1.0), strict=True):
        score = Score(kind="accuracy", value=value, asked=64, low=value, high=value, chance=0.2)
        row["scores"]["needle"], row["at_chance"] = score.plain(), []
    page = evaluation_html(record).replace("\u202f", " ")
    share = 100 * done[0].rows[1].budget
    assert "2 of 3 plans keep 95 % of that, snapkv with the smallest cache" in page
    assert f"{share:.1f} % of the bytes" in page


def test_unknown_records_are_refused(done: tuple[Evaluation, Path]) -> None:
    with pytest.raises(ArgumentError, match=r"evaluation\.schema"):
        evaluation_html(done[0].plain() | {"schema": "regard.evaluation/2"})
    with pytest.raises(ArgumentError, match=r"evaluation\.rows"):
        evaluation_html(done[0].plain() | {"rows": []})


def test_table_leaves_out_the_only_length(done: tuple[Evaluation, Path]) -> None:
    table = evaluation_table(done[0])
    assert [column.header for column in table.columns][:2] == ["plan", "needle"]
    assert table.row_count == 4
