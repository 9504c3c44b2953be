"""What a sweep leaves out and why, rivals that are timed once, and what a result tells of its
machine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from regard.bench import growth, machine, yardstick
from regard.bench.book import Book
from regard.bench.growth import Known, foreseen, too_large, too_long
from regard.bench.memory import sweep_memory
from regard.bench.rivals import Rivals, Setting
from regard.bench.roof import Roof
from regard.bench.spec import Spec
from regard.bench.sweep import Plan, Progress, sweep
from regard.bench.timing import Pace
from regard.bench.yardstick import Yardsticks

SMALL = Setting(heads=2, head_dim=8)
QUICK = Pace(budget=0.01, least=1, most=2)
SHAPE: yardstick.Shape = ("operator", True, 1, "forward")


def ignored(progress: Progress) -> None:
    """A watch that does not look."""


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Book:
    rates = {"matmul_float32": 1e9, "matmul_bfloat16": 1e9, "copy_bytes": 1e9, "read_bytes": 1e9}
    roof = Roof(**rates, buffer_bytes=2**20, last_cache_bytes=None)
    monkeypatch.setattr("regard.bench.book.measure_roof", lambda: roof)
    return Book(tmp_path, SMALL)


# Growth


@pytest.mark.parametrize(
    ("measured", "tokens", "expected"),
    [
        ({}, 64, None),
        ({32: 1.0}, 64, None),
        ({16: 1.0, 32: 4.0}, 64, 16.0),
        ({8: 9.0, 16: 1.0, 32: 2.0}, 128, 8.0),
        ({16: 4.0, 32: 1.0}, 64, 1.0),
        ({16: 1.0, 32: 1000.0}, 64, 8000.0),
        ({16: 1.0, 64: 4.0, 128: 9.0}, 64, None),
    ],
)
def test_costs_follow_the_power_of_the_last_two(
    measured: dict[int, float], tokens: int, expected: float | None
) -> None:
    assert foreseen(measured, tokens) == (expected and pytest.approx(expected))


def test_what_would_take_too_long_is_told() -> None:
    assert too_long({}, 64, 1.0) == ""
    assert too_long({16: 0.2, 32: 0.4}, 64, 1.0) == ""
    assert too_long({32: 1.5}, 64, 1.0) == "took 1.5 s at 32, over the cap of 1 s"
    assert "would take about 1.6 s at 64" in too_long({16: 0.1, 32: 0.4}, 64, 1.0)


def test_what_would_take_too_much_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {1024: 2.0**30, 2048: 2.0**32}
    monkeypatch.setattr(growth, "memory_limit", lambda: 2**33)
    assert "would need about 16 GiB at 4096, over the 8 GiB" in too_large(peaks, 4096)
    monkeypatch.setattr(growth, "memory_limit", lambda: 2**35)
    assert too_large(peaks, 4096) == ""
    monkeypatch.setattr(growth, "memory_limit", lambda: None)
    assert too_large(peaks, 4096) == ""


def test_nothing_longer_is_tried_after_a_failure() -> None:
    assert Known(failed=32).ends(64, 1.0) == "it failed at 32"
    assert Known().ends(64, 1.0) == ""


def test_memory_sweep_refuses_what_is_foreseen_not_to_fit(
    book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = Spec(name="softmax", options={"impl": "dense"})
    monkeypatch.setattr(growth, "memory_limit", lambda: 2**26)
    plan = Plan((dense,), (512, 1024, 4096), ("forward",), QUICK, 60.0)
    sweep_memory(plan, book, ignored)
    assert [p.status for p in book.speed.memory] == ["measured", "measured", "stopped"]
    assert "would need about" in book.speed.memory[-1].reason
    sweep(Plan((dense,), (4096,), ("forward",), QUICK, 60.0), book, ignored)
    (point,) = book.speed.times
    assert point.status == "stopped", "the sweep in time heeds the peaks that were weighed"
    assert "would need about" in point.reason


# Rivals that are timed once


def slow_rivals(tokens: int, calls: list[str]) -> Rivals:
    x = torch.zeros(1, 1, tokens, 4)

    def run(name: str) -> Callable[..., torch.Tensor]:
        return lambda q, k, v: calls.append(name) or q + 0

    return Rivals((tokens,), True, (x, x, x), run("own"), run("rival"))


def test_a_long_rival_is_timed_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yardstick, "LONG", 0.0)
    yardsticks, calls = Yardsticks({SHAPE: {8: 1.0, 16: 2.0}}), list[str]()
    first = yardsticks.clocked(slow_rivals(32, calls), SHAPE, QUICK)
    timed = calls.count("rival")
    assert timed > 0
    second = yardsticks.clocked(slow_rivals(32, calls), SHAPE, QUICK)
    assert calls.count("rival") == timed, "the second mechanism timed the rival again"
    assert second["baseline_seconds"] == first["baseline_seconds"]
    assert min(first["speedup"].median, second["speedup"].median) > 0


def test_a_short_rival_is_timed_in_turn_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yardstick, "LONG", float("inf"))
    yardsticks, calls = Yardsticks(), list[str]()
    for _ in range(2):
        yardsticks.clocked(slow_rivals(32, calls), SHAPE, QUICK)
    assert calls.count("own") == calls.count("rival") > 2
    assert set(yardsticks.seconds[SHAPE]) == {32}


def test_an_endless_rival_is_not_timed_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yardstick, "LONGEST", 1.0)
    yardsticks, calls = Yardsticks({SHAPE: {8: 1.0, 16: 4.0}}), list[str]()
    found: dict[str, Any] = yardsticks.clocked(slow_rivals(32, calls), SHAPE, QUICK)
    assert "rival" not in calls
    assert "speedup" not in found
    assert "about 16 s" in found["reason"]


def test_a_resumed_sweep_knows_how_long_rivals_take(book: Book) -> None:
    specs = (Spec(name="uniform"), Spec(name="hilo"))
    sweep(Plan(specs, (16, 32), ("forward",), QUICK), book, ignored)
    known = Yardsticks.from_points(book.speed.times).seconds
    assert set(known) == {SHAPE, ("layer", False, 2, "forward")}
    assert set(known[SHAPE]) == {16, 32}


# What a result tells of its machine


def test_a_command_names_no_folder_outside_the_working_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["bench", "speed", "--out", str(tmp_path / "runs" / "a b"), "--publish=/home/me/kept"]
    assert machine.command(given) == "regard bench speed --out 'runs/a b' --publish=kept"
    assert machine.command(["--mechanisms", "moh(a=1/2)"]) == "regard --mechanisms 'moh(a=1/2)'"


def test_hardware_names_no_kernel_and_no_host() -> None:
    import platform

    told = " ".join(map(str, machine.hardware().plain().values()))
    assert platform.release() not in told
    assert platform.node() not in told.split()
    assert machine.hardware().cores >= 1
