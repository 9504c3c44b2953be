"""Speed, memory and decoding: what is measured and how it is judged, never how fast it was."""

from __future__ import annotations

import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner, Result

from regard.bench import delta_rule
from regard.bench.block_sparse import Sparse
from regard.bench.book import Book
from regard.bench.decode import DecodePlan, decode
from regard.bench.delta_rule import GatedDelta
from regard.bench.efficiency import efficiencies, efficiency
from regard.bench.footprint import Job, footprint
from regard.bench.gate import gate, relative_error
from regard.bench.machine import cache_bytes, memory_limited
from regard.bench.memory import sweep_memory
from regard.bench.probes import Cut, Neighbours
from regard.bench.promises import measure_targets
from regard.bench.record import read_record
from regard.bench.rivals import Setting, rivals, size_for
from regard.bench.roof import PROBE_FLOPS, Roof, buffer_bytes, matmul_probe, measure_roof
from regard.bench.spec import Spec
from regard.bench.speed import DecodePoint, MemoryPoint, Speed, TimePoint
from regard.bench.sweep import Plan, Progress, every_mechanism, sweep
from regard.bench.targets import TARGETS, Target
from regard.bench.timing import Pace, interleaved, ratio, spread
from regard.cli.main import app
from regard.core import catalog
from regard.core.call import Call
from regard.core.call import Result as Outcome
from regard.core.catalog import cards
from regard.core.count import count_flops
from regard.core.errors import ArgumentError
from regard.core.scored import attend
from regard.core.weights import Scored
from regard.masks.blocks import Blocks
from regard.report.speed import speed_html, time_span, write_speed
from regard.testing.compare import close

SMALL = Setting(heads=2, head_dim=8)
QUICK = Pace(budget=0.01, least=1, most=2)
HOSTILE = '<script>alert(1)</script>"onload="alert(2)'


def ignored(progress: Progress) -> None:
    """A watch that does not look."""


def spec(name: str, **options: object) -> Spec:
    return Spec(name=name, options=options)


def plan(*names: str, lengths: tuple[int, ...] = (32, 64), cap: float = 10.0) -> Plan:
    return Plan(tuple(map(spec, names)), lengths, ("forward", "backward"), QUICK, cap)


@pytest.fixture(scope="session")
def roof() -> Roof:
    """Measured once: it takes seconds."""
    return measure_roof()


@pytest.fixture(autouse=True)
def _same_roof(roof: Roof, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.bench.book.measure_roof", lambda: roof)


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path, SMALL)


class Forgery:
    """Softmax attention whose fast form is wrong: its output, or only the gradient of k."""

    def __init__(self, wrong: str) -> None:
        self.wrong, self.tokens = wrong, []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, *, impl: str = "auto"
    ) -> Outcome:
        self.tokens.append(q.shape[2])
        if impl == "auto" and self.wrong == "gradient":
            k = k.detach()
        if self.wrong == "error":
            raise RuntimeError("out of order")
        result = attend(q, k, v, call, Scored())
        return Outcome(result.output * (1.1 if impl == "auto" and self.wrong == "output" else 1))


def forged(monkeypatch: pytest.MonkeyPatch, wrong: str) -> Forgery:
    """A mechanism called "forged", known for this test only."""
    forgery = Forgery(wrong)

    def build(q: Tensor, k: Tensor, v: Tensor, call: Call, *, impl: str = "auto") -> Outcome:
        return forgery(q, k, v, call, impl=impl)

    entry = replace(cards()["softmax"], name="forged", build=build, forms=("impl", ("dense",)))
    monkeypatch.setitem(catalog.cards(), "forged", entry)
    return forgery


# Timing and the roof


def test_rivals_take_turns_after_a_warm_up() -> None:
    calls: list[str] = []
    works = [lambda: calls.append("a"), lambda: calls.append("b")]
    times = interleaved(works, Pace(budget=1.0, least=3, most=3))
    assert "".join(calls) == "ab" * 4
    assert [len(rounds) for rounds in times] == [3, 3]


def test_a_round_beyond_the_budget_is_measured_once() -> None:
    calls: list[float] = []

    def slow() -> None:
        calls.append(sum(range(100_000)))

    (times,) = interleaved([slow], Pace(budget=1e-9, least=3, most=9))
    assert len(times) == 1
    assert len(calls) == 2


def test_another_call_may_stand_in_for_the_warm_up() -> None:
    calls: list[str] = []
    pace = Pace(budget=1.0, least=1, most=1)
    interleaved([lambda: calls.append("timed")], pace, warm_up=[lambda: calls.append("counted")])
    assert calls == ["counted", "timed"]


def test_spread_and_ratio() -> None:
    assert spread([3.0]).plain() == {"median": 3.0, "low": 3.0, "high": 3.0, "rounds": 1}
    found = spread([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (found.low, found.median, found.high, found.rounds) == (2.0, 3.0, 4.0, 5)
    assert ratio([2.0, 8.0, 30.0], [1.0, 2.0, 3.0]).median == 4.0


@pytest.mark.parametrize("values", [(0.0, 1, 1), (float("nan"), 1, 1), (1.0, 0, 1), (1.0, 3, 2)])
def test_a_pace_that_cannot_be_kept_is_refused(values: tuple[float, int, int]) -> None:
    with pytest.raises(ArgumentError, match="pace"):
        Pace(*values)


def test_roof(roof: Roof) -> None:
    assert min(roof.matmul_float32, roof.matmul_bfloat16, roof.copy_bytes, roof.read_bytes) > 0
    assert roof.buffer_bytes == buffer_bytes() >= 2 * (cache_bytes() or 0)
    with count_flops() as counted:
        matmul_probe()()
    assert counted.flops == pytest.approx(PROBE_FLOPS, rel=0.01)


def test_asking_for_too_much_memory_is_an_error_that_can_be_caught() -> None:
    with memory_limited(0.05), pytest.raises(RuntimeError, match="memory"):
        torch.empty(2**40)
    torch.empty(2**20)


# Rivals and the gate


@pytest.mark.parametrize("name", sorted(cards()))
def test_every_mechanism_is_in_the_sweep_and_passes_the_gate(name: str) -> None:
    assert spec(name) in every_mechanism()
    found = gate(spec(name), Setting(), "backward", 100)
    assert found.passed, found


def test_sizes() -> None:
    assert size_for(cards()["softmax"], 1000) == (1000,)
    assert size_for(cards()["hilo"], 1024) == (32, 32)
    assert all(side % 2 == 0 for side in size_for(cards()["hilo"], 2048))
    assert size_for(cards()["hilo"], 1) == (2, 2)


@pytest.mark.parametrize(
    ("name", "causal"), [("softmax", True), ("agent_attention", False), ("gna", False)]
)
def test_an_operator_meets_the_bare_function(name: str, causal: bool) -> None:
    found = rivals(spec(name), size_for(cards()[name], 64), SMALL)
    assert found.causal == causal
    got = found.baseline(*found.inputs)
    close(got, F.scaled_dot_product_attention(*found.inputs, is_causal=causal), name, 1e-6)


def test_a_layer_meets_the_standard_layer_with_its_projections() -> None:
    found = rivals(spec("hilo"), (8, 8), SMALL)
    (x,) = found.inputs
    assert x.shape == (1, 64, SMALL.dim)
    assert found.baseline(x).shape == x.shape
    assert sum(p.numel() for p in found.baseline_parameters) == 4 * SMALL.dim**2


def test_backward_gives_gradients_of_inputs_and_parameters() -> None:
    found = rivals(spec("hilo"), (8, 8), SMALL)
    first, _ = (work() for work in found.works("backward"))
    assert len(first) == 2 + len(found.parameters)  # type: ignore[arg-type]
    forward, _ = (work() for work in found.works("forward"))
    assert not forward[0].requires_grad  # type: ignore[index]


@pytest.mark.parametrize(
    ("wrong", "mode", "passed"),
    [
        ("output", "forward", False),
        ("gradient", "forward", True),
        ("gradient", "backward", False),
        ("nothing", "backward", True),
    ],
)
def test_the_gate_catches_a_wrong_mechanism(
    wrong: str, mode: Any, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    forged(monkeypatch, wrong)
    found = gate(spec("forged"), SMALL, mode, 50)
    assert found.passed is passed
    assert found.tokens == 50


def test_relative_error() -> None:
    one = torch.ones(3)
    assert relative_error(one, one) == 0.0
    assert relative_error(one * 1.5, one) == 0.5
    assert relative_error(one * 1e-9, 0 * one, floor=1e-3) == pytest.approx(1e-6)
    assert relative_error(one * float("nan"), one) == float("inf")
    assert relative_error(one[:2], one) == float("inf")


# The sweep


def test_a_sweep_measures_every_point_and_resumes(tmp_path: Path, book: Book) -> None:
    seen: list[Progress] = []
    sweep(plan("softmax", "lightning"), book, seen.append)
    points = read_record(tmp_path / "speed.json", Speed).times
    assert [(p.mechanism.name, p.mode, p.length) for p in points] == list(
        itertools.product(("softmax", "lightning"), ("forward", "backward"), (32, 64))
    )
    for point in points:
        assert point.status == "measured"
        assert point.gate is not None
        assert point.gate.passed
        assert point.flops is not None
        assert point.flops > 0
        assert point.fraction is not None
        assert point.speedup is not None
    assert seen[-1] == Progress(8, 8)
    again = Book(tmp_path, SMALL)
    sweep(plan("softmax", "lightning"), again, ignored)
    assert again.speed == book.speed
    sweep(plan("uniform", "softmax"), again, ignored)
    assert len(again.speed.sessions) == 2
    assert {p.session for p in again.speed.times} == {0, 1}


def test_a_longer_input_costs_more_operations(book: Book) -> None:
    sweep(plan("softmax", lengths=(64, 128)), book, ignored)
    short, long = (p.flops for p in book.speed.times if p.mode == "forward")
    assert short is not None
    assert long is not None
    assert 3.5 < long / short < 4.5


def test_a_wrong_mechanism_is_never_timed(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    forgery = forged(monkeypatch, "output")
    sweep(plan("forged"), book, ignored)
    assert {p.status for p in book.speed.times} == {"wrong"}
    assert all(p.seconds is None and p.speedup is None for p in book.speed.times)
    assert not {32, 64} & set(forgery.tokens), "it ran at a length that is timed"


def test_a_mechanism_that_fails_is_told_and_left(
    book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    forged(monkeypatch, "error")
    sweep(plan("forged"), book, ignored)
    assert [p.status for p in book.speed.times] == ["failed", "stopped"] * 2
    assert book.speed.times[0].reason == "RuntimeError: out of order"
    assert "failed at 32" in book.speed.times[1].reason


def test_a_slow_mechanism_is_stopped_and_says_so(book: Book) -> None:
    sweep(plan("uniform", lengths=(32, 64, 128), cap=1e-9), book, ignored)
    assert [p.status for p in book.speed.times] == ["measured", "stopped", "stopped"] * 2
    assert re.search(r"took .* s at 32, over the cap", book.speed.times[1].reason)


def test_another_setting_needs_another_folder(tmp_path: Path, book: Book) -> None:
    sweep(plan("uniform"), book, ignored)
    with pytest.raises(ArgumentError, match="another --out"):
        Book(tmp_path, Setting(heads=4, head_dim=8))
    (tmp_path / "speed.json").write_text("{}")
    with pytest.raises(ArgumentError, match=r"speed\.json"):
        Book(tmp_path, SMALL)


# Efficiency


@pytest.mark.parametrize(
    ("wins", "start", "loses", "text"),
    [
        ({256: False, 512: False, 1024: True, 2048: True}, 1024, (256, 512), "1024"),
        ({256: True, 512: False, 1024: True}, 1024, (512,), "1024"),
        ({256: True, 512: True}, 256, (), "≤ 256"),
        ({256: True, 512: False}, None, (512,), "never"),
        ({512: False}, None, (512,), "never"),
    ],
)
def test_efficiency_length(
    wins: dict[int, bool], start: int | None, loses: tuple[int, ...], text: str
) -> None:
    found = efficiency(spec("a"), "forward time", wins)
    assert (found.wins_from, found.loses, found.text) == (start, loses, text)
    assert found.measured == tuple(sorted(wins))


def time_point(name: str, length: int, speedup: float | None, mode: Any = "forward") -> TimePoint:
    timed = speedup is not None
    return TimePoint(
        mechanism=spec(name),
        family="scored",
        status="measured" if timed else "stopped",
        reason="" if timed else "it took too long",
        session=0,
        mode=mode,
        length=length,
        tokens=length,
        causal=True,
        seconds=spread([0.01]) if timed else None,
        speedup=spread([speedup]) if speedup is not None else None,
        fraction=0.5 if timed else None,
    )


def memory_point(name: str, length: int, peak: int) -> MemoryPoint:
    return MemoryPoint(
        mechanism=spec(name),
        family="scored",
        status="measured",
        session=0,
        mode="forward",
        length=length,
        tokens=length,
        peak_bytes=peak,
        baseline_bytes=1000,
    )


def test_efficiency_in_time_and_memory() -> None:
    times = [time_point("a", n, s) for n, s in ((1024, 2.0), (256, 0.5), (512, 1.0), (2048, None))]
    times.append(time_point("a", 256, 3.0, "backward"))
    memory = [memory_point("a", n, peak) for n, peak in ((256, 1000), (512, 999))]
    found = {e.what: e for e in efficiencies(times, memory)}
    assert found["forward time"].wins_from == 1024
    assert found["forward time"].measured == (256, 512, 1024)
    assert found["backward time"].text == "≤ 256"
    assert found["forward memory"].wins_from == 512
    assert found["forward memory"].loses == (256,)


# Memory and decoding


def test_peak_memory_sees_a_matrix_of_scores() -> None:
    def peak(impl: str) -> int:
        job = Job(
            spec=spec("softmax", impl=impl),
            size=(1024,),
            mode="forward",
            setting=SMALL,
            threads=1,
        )
        return footprint(job).bytes

    scores = SMALL.heads * 1024**2 * 4
    assert peak("dense") >= scores
    assert peak("sdpa") < scores


def test_memory_sweep_tells_what_fails(book: Book) -> None:
    bad = Plan((spec("sliding_window", window=0),), (64,), ("forward",), QUICK)
    sweep_memory(bad, book, ignored)
    (point,) = book.speed.memory
    assert point.status == "failed"
    assert "Window.size" in point.reason
    assert point.peak_bytes is None


def test_decoding_reads_what_the_state_holds(book: Book) -> None:
    names = ("softmax", "lightning", "tnl", "agent_attention")
    window = spec("sliding_window", window=16, sinks=0)
    decode(DecodePlan((*map(spec, names), window), 512, QUICK, 5.0), book, ignored)
    found = {p.mechanism.name: p for p in book.speed.decode}
    assert "agent_attention" not in found, "it does not decode"
    assert {p.status for p in found.values()} == {"measured"}
    token = 2 * SMALL.dim * 4
    assert found["softmax"].state_bytes == 512 * token
    assert found["sliding_window"].state_bytes in (15 * token, 16 * token, 17 * token)
    assert found["lightning"].state_bytes == SMALL.heads * SMALL.head_dim**2 * 4
    assert (found["lightning"].through, found["tnl"].through) == ("operator", "step")
    assert found["tnl"].keys == 512


def test_a_layer_reads_as_many_tokens_as_it_has_time_for(book: Book) -> None:
    decode(DecodePlan((spec("tnl"),), 10_000, QUICK, 1e-9), book, ignored)
    (point,) = book.speed.decode
    assert (point.asked, point.status) == (10_000, "measured")
    assert point.keys < 10_000


# Targets


def test_every_target_is_told_apart_and_judged_both_ways() -> None:
    told = [(t.name, t.probe.setting, t.probe.unit) for t in TARGETS]
    assert len(set(told)) == len(told)
    lower = Target("a", Cut(spec("softmax"), 64), "at least", 2)
    assert (lower.kept(2), lower.kept(1.9)) == (True, False)
    assert replace(lower, sense="at most").kept(1.9)


def test_targets_are_measured_once_and_absent_ones_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, delta_rule.MODULE, None)
    book = Book(tmp_path, Setting())
    chosen = (
        Target("cut", Cut(spec("lightning"), 64), "at least", 0),
        Target("blocks", Sparse(0.5, 256), "at most", 0),
        Target("near", Neighbours(spec("neighborhood", kernel=3), (6, 6), SMALL), "at least", 0),
        Target("none", GatedDelta(64), "at least", 1),
        Target("unknown", Cut(spec("sofmax"), 64), "at least", 1),
    )
    measure_targets(chosen, QUICK, book, ignored)
    found = {p.name: p for p in book.speed.targets}
    assert [found[name].passed for name in ("cut", "blocks", "near")] == [True, False, True]
    assert found["none"].passed is None
    assert "pip install transformers" in found["none"].reason
    assert "softmax" in found["unknown"].reason
    measure_targets(chosen, QUICK, book, ignored)
    assert len(book.speed.targets) == len(chosen)


def test_a_wrong_target_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forged(monkeypatch, "output")
    book = Book(tmp_path, Setting())
    chosen = [Target("forged", Cut(spec("forged"), 64), "at least", 0)]
    measure_targets(chosen, QUICK, book, ignored)
    (point,) = book.speed.targets
    assert (point.reached, point.passed) == (None, None)
    assert "relative error" in point.reason


def test_blocks_are_visible_as_their_map_says() -> None:
    chart = torch.tensor([[[[True, False], [False, True]]]])
    x = torch.randn(1, 2, 300, 4, dtype=torch.float64)
    method = Scored(mask=Blocks(chart, 128))
    dense = attend(x, x, x, Call(), method, impl="dense").output
    close(attend(x, x, x, Call(), method, impl="tiled").output, dense, "blocks", 1e-10)
    assert not dense[:, :, 256:].any(), "beyond the map nothing is visible"
    with pytest.raises(ArgumentError, match=r"Blocks\.map"):
        Blocks(chart.float(), 128)
    with pytest.raises(ArgumentError, match=r"Blocks\.size"):
        Blocks(chart, 0)


# The report


def made(book: Book) -> dict[str, Any]:
    """Results of two mechanisms, without a clock."""
    assert book.session == 0
    book.add("times", [time_point("a", n, n / 512) for n in (256, 512, 1024, 2048)])
    book.add("times", [time_point("a", 512, 0.7, "backward")])
    book.add("times", [time_point("b", 256, 0.5), time_point("b", 512, None)])
    book.add("memory", [memory_point("a", 256, 10)])
    return book.speed.plain()


def test_the_report_shows_curves_and_efficiency_lengths(tmp_path: Path, book: Book) -> None:
    html = speed_html(made(book))
    assert html.count('<figure class="panel') == 2
    prose = " ".join(re.sub(r"<[^>]+>", " ", html).split())
    assert "1 of 2 mechanisms end up faster" in prose
    assert "faster from 1,024" in prose
    assert "loses at 256, 512" in prose
    assert "never faster" in prose
    assert "it took too long" in prose
    assert "default-src &#39;none&#39;" in html
    assert not re.search(r'(src|href)="(?!#|data:)', html)
    write_speed(book.speed.plain(), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == html


def test_the_report_says_what_does_not_decode_and_what_was_weighed_alone(book: Book) -> None:
    made(book)
    step: dict[str, Any] = {"asked": 8, "keys": 8, "state": "keys", "through": "operator"}
    shared = {"family": "scored", "status": "measured", "session": 0}
    book.add("decode", [DecodePoint(mechanism=spec("a"), **shared, **step)])
    alone = memory_point("a", 512, 10).model_copy(update={"baseline_bytes": None})
    book.add("memory", [alone])
    html = speed_html(book.speed.plain())
    (undecoded,) = re.findall(r"do not decode token by token: (.*?)</p>", html)
    assert undecoded == "<code>b</code>."
    prose = " ".join(re.sub(r"<[^>]+>", " ", html).split())
    assert "alone" in prose.partition("Peak memory")[2]


def test_the_report_escapes_everything(book: Book) -> None:
    results = made(book)
    results["times"][0]["mechanism"]["name"] = HOSTILE
    results["times"][-1]["reason"] = HOSTILE
    results["sessions"][0]["command"] = HOSTILE
    html = speed_html(results)
    assert HOSTILE not in html
    assert html.count("<script>") == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema": "regard.speed/2"}, "speed.schema: expected regard.speed/1"),
        ({"times": [{}]}, "speed.times.0.mechanism"),
        ({"sessions": []}, "speed.sessions"),
    ],
)
def test_results_of_another_kind_are_refused(change: dict[str, Any], told: str, book: Book) -> None:
    with pytest.raises(ArgumentError, match=re.escape(told)):
        speed_html({**made(book), **change})


def test_time_span() -> None:
    said = [time_span(seconds).replace("\u202f", " ") for seconds in (2.5, 0.0123, 4.2e-5, 0)]
    assert said == ["2.5 s", "12.3 ms", "42 µs", "0 µs"]


# The command


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.mark.parametrize("verb", ["speed", "memory", "decode", "targets"])
def test_help_has_an_example(verb: str) -> None:
    assert f"Example: regard bench {verb}" in " ".join(run(verb, "--help").stdout.split())


def test_speed_and_decode_gather_in_one_folder(tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"), "--threads", str(torch.get_num_threads()))
    first = run("speed", "--mechanisms", "uniform", "--lengths", "16..32", "--budget", "0.01", *out)
    assert first.exit_code == 0, first.output
    assert "uniform" in first.stdout
    publish = ("--publish", str(tmp_path / "kept"))
    second = run(
        "decode", "--mechanisms", "uniform", "--keys", "64", "--budget", "0.01", *out, *publish
    )
    assert second.exit_code == 0, second.output
    result = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert result["schema"] == "regard.speed/1"
    assert (len(result["times"]), len(result["decode"])) == (4, 1)
    assert (tmp_path / "out" / "report.html").exists()
    kept = sorted(path.suffix for path in (tmp_path / "kept").iterdir())
    assert kept == [".html", ".json"]


def test_an_interruption_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def interrupted(works: Any, pace: Pace) -> dict[str, Any]:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return {"seconds": spread([0.01]), "baseline_seconds": spread([0.01])}

    monkeypatch.setattr("regard.bench.yardstick.clocked", interrupted)
    result = run("speed", "--mechanisms", "uniform", "--lengths", "16,32", "--out", str(tmp_path))
    assert result.exit_code == 130
    assert "the same command resumes" in result.stderr
    kept = read_record(tmp_path / "speed.json", Speed)
    assert [p.length for p in kept.times] == [16]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("speed", "--mechanisms", "sofmax"), "unknown mechanism 'sofmax'; did you mean softmax"),
        (("speed", "--mechanisms", "softmax(window=3)"), "unknown option of softmax 'window'"),
        (("speed", "--mechanisms", ""), "mechanisms: expected name or name(option=value"),
        (("speed", "--mode", "sideways"), "unknown mode 'sideways'"),
        (("speed", "--lengths", "many"), "lengths: expected numbers such as 256,1024"),
        (("speed", "--lengths", "512..256"), "lengths: expected numbers of tokens, each once"),
        (("speed", "--lengths", "0"), "lengths: expected numbers of tokens, each once"),
        (("speed", "--lengths", "8,8"), "lengths: expected numbers of tokens, each once"),
        (("speed", "--budget", "0"), "pace: expected seconds > 0"),
        (("speed", "--cap", "nan"), "cap: expected seconds above 0, got nan"),
        (("memory", "--mechanisms", "softmax,softmax"), "mechanisms: expected each one once"),
        (("decode", "--fill", "-1"), "fill: expected seconds above 0, got -1.0"),
        (("targets", "--only", "windwo"), "unknown target 'windwo'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert told in line
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("")
    result = run("speed", "--mechanisms", "uniform", "--out", str(place))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "out: expected a folder" in result.stderr
