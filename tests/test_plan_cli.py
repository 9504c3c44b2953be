"""`regard plan`, and README's section on plans as typed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import saved_model, small_pocket
from typer.testing import CliRunner, Result

import regard
from regard.cli.main import app
from regard.core.catalog import treatments
from regard.plan import Plan, Signature, Step, Storage

pytest.importorskip("transformers")
README = Path(__file__).resolve().parents[1] / "README.md"
TEXT = "The quick brown fox jumps over the lazy dog. " * 4


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def failure(*arguments: str) -> str:
    """The one line on standard error of a command that must fail."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a plan, where the pocket model is a small untrained one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("regard.pocket.language", small_pocket)
    step = Step(treatment="stream", options={"sinks": 2, "recent": 6}, layers="1-", kv_heads="0")
    Plan(steps=(step,)).save("stream.json")
    return tmp_path


def test_show_tells_steps_in_words() -> None:
    steps = (
        Step(treatment="snapkv", options={"budget": 1.0}, phases=("prefill",)),
        Step(treatment="head_silence", layers=[0, 2], heads="1", modules="model.layers.*"),
    )
    made = Signature(model="LlamaForCausalLM", layers=3, heads=4, kv_heads=2)
    stored = Storage(backend="hqq", bits=4)
    Plan(name="mine", made_for=made, steps=steps, storage=stored).save("two.json")
    told = " ".join(run("plan", "show", "two.json").stdout.split())
    for text in (
        "two.json, mine: 2 steps, made for LlamaForCausalLM of 3 layers",
        "0: snapkv(budget=1.0)",
        treatments()["snapkv"].summary,
        "on all heads, all layers in prefill changes nothing with these options",
        "1: head_silence",
        "on heads 1, layers 0, 2, of the modules model.layers.* in prefill and decode",
        "storage: hqq(bits=4), all layers",
    ):
        assert text in told
    assert "on key heads 0 and the query heads they serve, layers 1-" in " ".join(
        run("plan", "show", "stream.json").stdout.split()
    )


def test_check_prints_which_step_acts_where(tmp_path: Path) -> None:
    assert run("plan", "check", "stream.json").stdout == "stream.json: a valid plan of 1 step\n"
    table = run("plan", "check", "stream.json", "pocket").stdout
    assert table.strip() == Plan.load("stream.json").explain(small_pocket()[0])
    assert "    1  0 0 . ." in table
    assert "    0  " not in table
    folder = saved_model(tmp_path / "model")
    assert run("plan", "check", "stream.json", str(folder)).stdout == table


def test_apply_generates_under_the_plan() -> None:
    result = run("plan", "apply", "stream.json", "--prompt", TEXT, "--tokens", "5", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    model, vocabulary = small_pocket()
    ids = torch.tensor([vocabulary.encode(TEXT)])
    with Plan.load("stream.json").applied(model) as running:
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert found["tokens"] == out[0, ids.shape[1] :].tolist()
    assert found["text"] == vocabulary.decode(found["tokens"])
    assert found["prompt_tokens"] == ids.shape[1]
    assert found["cache"] == running.report()
    assert found["cache"]["layers"][1]["buckets"][0] == {
        "heads": [0], "keys": 8, "bytes": found["cache"]["layers"][1]["buckets"][0]["bytes"],
    }  # fmt: skip
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert out[0].tolist() != plain[0].tolist()


def test_apply_prints_text_and_cache() -> None:
    Path("prompt.txt").write_text(TEXT)
    arguments = ("plan", "apply", "stream.json", "--tokens", "3")
    found = json.loads(run(*arguments, "--prompt", TEXT, "--json").stdout)
    told = run(*arguments, "--prompt-file", "prompt.txt").stdout.replace("\u202f", " ")
    assert told.startswith(found["text"])
    cache = found["cache"]
    assert f"budget (kept) {100 * cache['budget']:.1f} %" in told
    assert f"compression ratio (removed) {100 * cache['compression_ratio']:.1f} %" in told
    rows = [line for line in told.splitlines() if line.startswith("│")]
    assert len(rows) == sum(len(layer["buckets"]) for layer in cache["layers"]) == 5


def test_apply_in_a_folder(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    result = run("plan", "apply", "stream.json", str(folder), "--prompt", "So", "--tokens", "2")
    assert result.exit_code == 0, result.output
    assert "budget (kept)" in result.stdout


def test_treatments_are_listed_and_told() -> None:
    told = run("plan", "treatments").stdout
    records = json.loads(run("plan", "treatments", "--json").stdout)
    assert [record["name"] for record in records] == list(treatments())
    for name, card in treatments().items():
        assert name in told
        assert card.doc in run("plan", "treatments", name).stdout
    told = run("plan", "treatments", "snapkv").stdout
    for text in ("window: int = 32", "keep", "golden", "2404.14469", "regard evaluate --plan"):
        assert text in told
    assert run("info", "snapkv").stdout == told
    assert json.loads(run("info", "snapkv", "--json").stdout)["kind"] == "treatment"


def test_facade() -> None:
    assert regard.Plan is Plan
    assert regard.treatment("snapkv") is treatments()["snapkv"]
    assert regard.treatment_cards() == treatments()


@pytest.mark.parametrize("verb", ["show", "check", "apply", "treatments"])
def test_help_of_every_verb_has_an_example(verb: str) -> None:
    told = " ".join(run("plan", verb, "--help").stdout.split())
    assert f"Example: regard plan {verb}" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("show", "none.json"), "plan: expected a JSON file, got none.json"),
        (("show", "bad.json"), "(in bad.json)"),
        (("check", "newer.json"), "this regard reads plans of version 1; update regard"),
        (("check", "far.json", "pocket"), "steps[0].layers: expected numbers from -3 to 2, got 7"),
        (("apply", "far.json", "--prompt", "x"), "(in far.json)"),
        (("check", "stream.json", "./none"), "MODEL: expected an existing folder, got ./none"),
        (("apply", "stream.json"), "prompt, prompt-file: expected exactly one of the two"),
        (("apply", "stream.json", "--prompt", "x", "--prompt-file", "y"), "exactly one"),
        (("apply", "stream.json", "--prompt", ""), "prompt: expected 1 to 1984 tokens of text"),
        (("apply", "stream.json", "--prompt", "x" * 3000), "got 3001 tokens"),
        (("apply", "stream.json", "--prompt-file", "none.txt"), "prompt-file: expected a readable"),
        (("treatments", "snapkw"), "unknown treatment 'snapkw'; did you mean snapkv"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], told: str) -> None:
    Path("bad.json").write_text("{}")
    Path("newer.json").write_text('{"schema_version": 2, "steps": []}')
    far: dict[str, Any] = {"treatment": "stream", "options": {"recent": 4}, "layers": [7]}
    Path("far.json").write_text(json.dumps({"schema_version": 1, "steps": [far]}))
    assert told in failure("plan", *arguments)


def test_readme_on_plans_works_as_typed(capsys: pytest.CaptureFixture[str]) -> None:
    section = README.read_text().split("## Plans")[1].split("\n## ")[0]
    blocks = re.findall(r"```(\w+)\n(.*?)```", section, re.S)
    assert [kind for kind, _ in blocks] == ["bash", "python", "bash"]
    files, check = blocks[0][1].rsplit("END\n", 1)
    subprocess.run(["bash", "-ec", f"{files}END\n"], check=True)
    assert {path.name for path in Path().glob("*.json")} == {"snapkv.json", "stream.json"}
    assert run(*shlex.split(check, comments=True)[1:]).exit_code == 0
    exec(compile(blocks[1][1], "README", "exec"), {})
    held, dense = map(int, re.findall(r"\d+", capsys.readouterr().out))
    assert held < 0.35 * dense
    small = ["--length", "160", "--examples", "1", "--tokens", "1", "--seconds", "0"]
    result = run(*shlex.split(blocks[2][1])[1:], *small)
    assert result.exit_code == 0, result.output
    assert Path("runs/plans/report.html").is_file()
