r"""A study of nothing much: it counts, so that the command that runs studies can be tried.

    y = x + shift

x: numbers from 0 on, `steps` of them.
"""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_report import HOSTILE, Page
from typer.testing import CliRunner, Result

from regard.cli.main import app
from regard.core import catalog
from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.study import Curve, Figure, Map, Outcome, Progress, StudyCard
from regard.report.axes import fitting_axis, linear_axis
from regard.report.heat import heat
from regard.report.lines import line_chart
from regard.report.study import StudyRun, bounds_text, study_html, write_study


@dataclass(frozen=True)
class Counting:
    """Counts."""

    steps: int = 4
    shift: float = 0.5
    sizes: tuple[int, ...] = (1, 2)
    word: str = "count"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ArgumentError("steps", "2 or more", self.steps)

    def run(self, progress: Progress) -> Outcome:
        points = [(float(x), x + self.shift + self.seed) for x in range(self.steps)]
        progress(1.0)
        return Outcome(
            (
                Figure("last", points[-1][1], "about 3.5", 3.0, 4.0),
                Figure("shift", self.shift, f"small {HOSTILE}", high=1.0),
                Figure("never", math.nan if self.seed else 1.0, "one", low=1.0),
            ),
            (Curve("Counted", "step", "y", {"y": points, HOSTILE: points[:1]}),),
            (Map("Picture", "row", "column", [[-1.0, 0.0], [math.nan, 2.0]]),),
        )


CARD = StudyCard(
    name="counting",
    build=Counting,
    papers=(Paper("1706.03762", "Attention Is All You Need", 2017),),
    claim=Claim("numbers follow each other", "regard study counting"),
    seconds=1,
)


@pytest.fixture(autouse=True)
def _one_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "study_cards", lambda: {"counting": CARD})


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["study", *arguments])


def of(study: Counting) -> StudyRun:
    outcome = study.run(lambda share: None)
    return StudyRun(CARD, {"steps": study.steps}, outcome, 1.5, "regard study", {"torch": "2.9"})


def drawings(page: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r'<svg class="chart".*?</svg>', page, re.S)]


def test_lists_every_study() -> None:
    said = run().stdout
    assert "counting" in said
    assert "A study of nothing much" in said
    assert "1706.03762 (2017)" in said


def test_help_has_an_example() -> None:
    assert "Example: regard study" in " ".join(run("--help").stdout.split())


def test_figures_are_printed_with_marks() -> None:
    result = run("counting", "--no-progress")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    (last,) = [line for line in lines if "last" in line]
    for text in ("✓", "3.5", "3 to 4", "about 3.5"):
        assert text in last
    (missed,) = [
        line for line in run("counting", "--seed", "1").stdout.splitlines() if "last" in line
    ]
    assert "✗" in missed


def test_check_tells_by_exit_code() -> None:
    assert run("counting", "--check").exit_code == 0
    assert run("counting", "--seed", "1").exit_code == 0
    result = run("counting", "--seed", "1", "--check")
    assert result.exit_code == 1
    assert "not every figure holds" in result.stderr


def test_fields_are_set_by_type(tmp_path: Path) -> None:
    given = ("--set", "steps=3", "--set", "shift=2", "--set", "sizes=(3,)", "--set", "word=x")
    assert run("counting", *given, "--out", str(tmp_path)).exit_code == 0
    record = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    assert record["options"] == {"steps": 3, "shift": 2.0, "sizes": [3], "word": "x", "seed": 0}
    assert record["figures"][1]["value"] == 2.0
    assert not record["figures"][1]["holds"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("countin",), "did you mean counting"),
        (("counting", "--set", "stepz=3"), "did you mean steps"),
        (("counting", "--set", "steps=1.5"), "steps: expected a whole number"),
        (("counting", "--set", "shift=True"), "shift: expected a number"),
        (("counting", "--set", "sizes=3"), "sizes: expected a list"),
        (("counting", "--set", "word=3"), "word: expected str"),
        (("counting", "--set", "steps=1"), "steps: expected 2 or more"),
        (("counting", "--set", "seed=1", "--seed", "2"), "seed: expected once"),
        (("counting", "--set", "steps"), "set: expected name=value"),
    ],
)
def test_wrong_arguments_are_named(arguments: Sequence[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr


def test_out_holds_record_and_page(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "er"
    assert run("counting", "--seed", "1", "--out", str(folder)).exit_code == 0
    assert sorted(p.name for p in folder.iterdir()) == ["study.html", "study.json"]
    record = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    assert record["schema"] == "regard.study/1"
    assert record["figures"][2]["value"] is None
    assert record["maps"][0]["values"] == [[-1.0, 0.0], [None, 2.0]]
    assert record["versions"]["torch"]
    prose = Page((folder / "study.html").read_text(encoding="utf-8")).prose
    assert "1 of 3 figures lie where the paper expects; not so: last, never." in prose
    file = tmp_path / "file"
    file.touch()
    assert "out: expected a folder" in run("counting", "--out", str(file)).stderr


def test_page_is_complete_and_inert() -> None:
    page = study_html(of(Counting()))
    seen = Page(page)
    assert len(seen.named("script")) == 1
    assert not any(name.startswith("on") for _, attributes in seen.tags for name in attributes)
    for text in (
        "y = x + shift",
        HOSTILE,
        "about 3.5",
        "Attention Is All You Need",
        "all 3 figures",
    ):
        assert text in seen.prose
    curve, picture = drawings(page)
    paths = [p for p in curve.iter("path") if p.get("class") == "mean"]
    assert [len(re.findall(r"[ML]", p.attrib["d"])) for p in paths] == [4]
    assert len([p for p in picture.iter("path") if p.get("class") == "unknown"]) == 1
    assert len([p for p in picture.iter("path") if p.get("fill")]) == 3


def test_page_is_written_to_a_folder_that_exists(tmp_path: Path) -> None:
    write_study(of(Counting()), tmp_path / "study.html")
    assert (tmp_path / "study.html").read_text(encoding="utf-8") == study_html(of(Counting()))
    with pytest.raises(ArgumentError, match="path"):
        write_study(of(Counting()), tmp_path / "nowhere" / "study.html")


def test_bounds_read_well() -> None:
    assert bounds_text(Figure("x", 1, "", 0.5, 2)) == "0.5 to 2"
    assert bounds_text(Figure("x", 1, "", low=-0.5)) == "≥ −0.5"
    assert bounds_text(Figure("x", 1, "", high=1e-9)) == "≤ 1e−09"
    assert bounds_text(Figure("x", 1, "")) == "any"


def test_lines_are_to_scale_and_broken_where_nothing_is() -> None:
    points = [(0.0, 0.0), (1.0, 1.0), (2.0, math.nan), (3.0, 1.0), (4.0, 2.0)]
    chart = line_chart(("t", "x", "y"), {"a": points, "b": [(0.0, 2.0)]})
    line, dot = chart.lines
    assert len(line.paths) == 2
    assert dot.paths == ()
    assert dot.dots == ((chart.plot.left, chart.plot.top),)
    assert line.dots[0] == (chart.plot.left, chart.plot.bottom)
    many = [(float(i), 1000.0 if i == 777 else math.sin(i)) for i in range(5000)]
    (thin,) = line_chart(("t", "x", "y"), {"a": many}).lines
    assert 400 < len(re.findall(r"[ML]", thin.paths[0])) <= 800
    assert re.search(r" 26(L|$)", thin.paths[0]), "a spike is never lost"
    assert line_chart(("t", "x", "y"), {"a": [(math.nan, 1.0)]}).lines[0].paths == ()


def test_axes_fit_their_values() -> None:
    axis = linear_axis([0.13, 0.94])
    assert (axis.low, axis.high) == pytest.approx((0.0, 1.0))
    assert [tick.text for tick in axis.ticks] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert [tick.text for tick in linear_axis([-2, 3]).ticks][:2] == ["−2", "−1"]
    same = linear_axis([5.0, 5.0])
    assert same.low < 5 < same.high
    assert linear_axis([0, 0], whole=True).low == 0
    assert all(tick.value == round(tick.value) for tick in linear_axis([0, 3], whole=True).ticks)
    assert fitting_axis([1e-5, 1.0]).log
    assert not fitting_axis([0.0, 1.0]).log


def test_large_maps_are_averaged() -> None:
    values = [[float(i)] * 1000 for i in range(4)]
    picture = heat("t", "r", "c", values)
    assert picture.averaged == (1, 7)
    assert (picture.low, picture.high) == (0.0, 3.0)
    assert len(picture.cells) == 4
    signed = heat("t", "r", "c", [[-1.0, 3.0]])
    assert (signed.low, signed.high) == (-3.0, 3.0)
    nothing = heat("t", "r", "c", [[math.nan]])
    assert nothing.unknown
    assert nothing.cells == ()
