"""The HTML report of a comparison: complete, inert, offline, and drawn to scale."""

from __future__ import annotations

import copy
import re
import xml.etree.ElementTree as ET
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from regard.core.errors import ArgumentError
from regard.report.axes import accuracy_axis, log_axis
from regard.report.comparison import comparison_html, write_comparison
from regard.report.curves import panel
from regard.report.finding import finding
from regard.report.labels import Box, Scene, Segment, Wanted, place
from regard.report.page import code, page
from regard.report.record import read_comparison
from regard.report.units import amount, byte_size, duration, percent, short_percent

HOSTILE = '<script>alert(1)</script>"onload="alert(2)'
FAMILIES = ("scored", "recurrent", "selected", "pooled", "free", "somebody's own")


def row(index: int, accuracy: float | None, state: int | None, seeds: int = 2) -> dict[str, Any]:
    label = f"method_{index}(width={index})"
    found = accuracy or 0.0
    curve = [{"step": s, "loss": 1.0, "accuracy": found * s / 100} for s in (0, 50, 100)]
    return {
        "label": label,
        "mechanism": f"method_{index}",
        "options": {"width": index},
        "family": FAMILIES[index % len(FAMILIES)],
        "citations": [
            {
                "title": f"Paper {index}",
                "arxiv": "1706.03762",
                "year": 2017,
                "url": "https://x.org/a",
            }
        ],
        "summary": "Weighs `keys` by likeness.",
        "lr": 0.003,
        "lrs": {"0.001": 0.2, "0.003": 0.9, "0.01": None},
        "accuracy_mean": accuracy,
        "accuracy_std": 0.0 if seeds > 1 else None,
        "accuracies": [accuracy] * seeds,
        "parameters": 104_832,
        "state_bytes": state,
        "flops_total": 1e12 * (1 + index / 10),
        "flops_per_step": 1e9,
        "steps_to_99": 100 if found >= 0.99 else None,
        "curves": [{"seed": seed, "points": curve} for seed in range(seeds)],
    }


def comparison(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": "regard.comparison/1",
        "task": {"name": "recall", "pairs": 8},
        "chance": 0.05,
        "rows": list(rows),
        "hardware": {"processor": "a processor", "cores": 2},
        "versions": {"regard": "0.1", "torch": "2.9"},
        "seconds": 252.0,
        "command": "regard compare --task recall",
        "notes": ["1 of 9 trials was made elsewhere"],
    }


def some(count: int = 6) -> dict[str, Any]:
    accuracies = (1.0, 0.995, 0.62, 0.31, 0.99, 0.06)
    return comparison(*(row(i, accuracies[i % 6], 1024 * 2 ** (i % 6)) for i in range(count)))


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def prose(self) -> str:
        return " ".join("".join(self.text).split())


def drawings(html: str, name: str) -> list[ET.Element]:
    """The SVGs of one chart: the wide one and the narrow one."""
    found = re.findall(rf'<svg class="chart"[^>]*data-chart="{name}">.*?</svg>', html, re.S)
    return [ET.fromstring(text) for text in found]


def marks(svg: ET.Element) -> dict[int, tuple[float, float]]:
    places = [g for g in svg.iter("g") if g.get("class", "").startswith("mark ")]
    return {
        int(g.attrib["data-row"]): (float(g.attrib["data-x"]), float(g.attrib["data-y"]))
        for g in places
    }


def ticks(svg: ET.Element, kind: str) -> dict[str, float]:
    texts = [t for t in svg.iter("text") if t.get("class") == kind]
    shift = 4 if kind == "y" else 0  # a text stands on its baseline
    return {str(t.text).replace("\u202f", " "): float(t.attrib[kind]) - shift for t in texts}


def test_page_shows_every_row_and_how_it_was_made() -> None:
    prose = Page(comparison_html(some())).prose
    for entry in some()["rows"]:
        assert entry["label"] in prose
        assert entry["citations"][0]["title"] in prose
    for text in (
        "recall",
        "4 min 12 s",
        "regard compare --task",
        "2.9",
        "a processor",
        "elsewhere",
    ):
        assert text in prose.replace("\u202f", " ")


def test_page_needs_no_network_and_runs_one_script() -> None:
    html = comparison_html(some())
    seen = Page(html)
    (policy,) = [
        str(m["content"])
        for m in seen.named("meta")
        if m.get("http-equiv") == "Content-Security-Policy"
    ]
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.S)
    digest = b64encode(sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert len(seen.named("script")) == 1
    for tag, attributes in seen.tags:
        for name, value in attributes.items():
            assert name != "style"
            assert name != "src"
            assert not name.startswith("on")
            if name in ("href", "xlink:href") and tag != "a":
                assert value == "data:," or str(value).startswith("#")
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", html)


def test_hostile_text_is_inert() -> None:
    bad = some(2)
    bad["task"] = {"name": HOSTILE, HOSTILE: HOSTILE}
    bad["command"] = HOSTILE
    bad["notes"] = [HOSTILE]
    bad["hardware"] = {HOSTILE: [HOSTILE]}
    bad["rows"][0] |= {"label": HOSTILE, "mechanism": HOSTILE, "family": HOSTILE}
    bad["rows"][0]["summary"] = f"`{HOSTILE}` {HOSTILE}"
    bad["rows"][0]["citations"] = [{"title": HOSTILE, "url": "javascript:alert(1)"}]
    html = comparison_html(bad)
    seen = Page(html)
    assert len(seen.named("script")) == 1
    assert HOSTILE in seen.prose
    assert not any(name.startswith("on") for _, attributes in seen.tags for name in attributes)
    links = [str(a["href"]) for a in seen.named("a")]
    assert all(link.startswith(("https://", "#")) for link in links)
    for name in ("state", "compute"):
        for svg in drawings(html, name):
            assert {element.tag for element in svg.iter()} <= {
                "svg",
                "g",
                "path",
                "text",
                "title",
                "polyline",
                "rect",
            }


def test_log_axes_are_to_scale() -> None:
    data = comparison(row(0, 1.0, 2048), row(1, 0.5, 16384), row(2, 0.25, 65536))
    html = comparison_html(data)
    for svg in drawings(html, "state"):
        x, y, at = ticks(svg, "x"), ticks(svg, "y"), marks(svg)
        assert (at[1][0], at[2][0]) == pytest.approx((x["16 KiB"], x["64 KiB"]))
        per_doubling = (at[2][0] - at[0][0]) / 5
        assert at[1][0] == pytest.approx(at[0][0] + 3 * per_doubling, abs=0.05)
        assert [at[i][1] for i in range(3)] == pytest.approx([y["100 %"], y["50 %"], y["25 %"]])
        (chance,) = [p for p in svg.iter("path") if p.get("class") == "chance"]
        expected = y["0 %"] + 0.05 * (y["100 %"] - y["0 %"])
        assert float(chance.attrib["d"].split()[1].split("H")[0]) == pytest.approx(
            expected, abs=0.02
        )
    for svg in drawings(html, "compute"):
        x, at = ticks(svg, "x"), marks(svg)
        assert at[0][0] == pytest.approx(x["1 T"])
    assert len(drawings(html, "state")) == len(drawings(html, "compute")) == 2


@pytest.mark.parametrize("count", [1, 6, 20])
def test_labels_cover_neither_each_other_nor_marks(count: int) -> None:
    for name in ("state", "compute"):
        for svg in drawings(comparison_html(some(count)), name):
            width, height = (float(v) for v in svg.attrib["viewBox"].split()[2:])
            texts = [
                g.find("text") for g in svg.iter("g") if g.get("class", "").startswith("label ")
            ]
            boxes = []
            for text in (t for t in texts if t is not None):
                left, base = float(text.attrib["x"]), float(text.attrib["y"])
                boxes.append(Box(left, base - 10, left + 6.9 * len(text.text or ""), base + 3))
            assert all(box.inside(Box(0, 0, width, height)) for box in boxes)
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
            dots = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in marks(svg).values()]
            assert not any(box.overlaps(dot) for box in boxes for dot in dots)
            assert len(marks(svg)) == count


def test_rows_that_do_not_decode_leave_the_state_chart() -> None:
    html = comparison_html(comparison(row(0, 1.0, None), row(1, 0.4, 0), row(2, 0.3, 4096)))
    prose = Page(html).prose
    assert "does not decode" in prose
    assert "state of zero bytes" in prose
    assert [len(marks(svg)) for svg in drawings(html, "state")] == [1, 1]
    assert [len(marks(svg)) for svg in drawings(html, "compute")] == [3, 3]
    assert drawings(comparison_html(comparison(row(0, 1.0, None))), "state") == []


def test_one_row_with_one_seed_has_no_spread() -> None:
    html = comparison_html(comparison(row(0, 1.0, 4096, seeds=1)))
    assert "±" not in Page(html).prose
    assert "± 0.0" in Page(comparison_html(comparison(row(0, 1.0, 4096, seeds=2)))).prose


def test_diverged_runs_are_marked() -> None:
    partly, wholly = row(1, 0.5, 4096), row(2, None, 4096)
    partly["curves"][0] = copy.deepcopy(partly["curves"][0])
    partly["curves"][0]["points"][1]["loss"] = float("nan")
    for curve in wholly["curves"]:
        curve["points"] = [{"step": 25, "loss": None, "accuracy": None}]
    html = comparison_html(comparison(row(0, 1.0, 4096), partly, wholly))
    prose = Page(html).prose
    assert "1 of 2 diverged" in prose
    assert "no curve recorded" in prose
    assert "Training of method_1(width=1) and method_2(width=2) diverged" in prose
    assert html.count('class="stop"') == 1
    assert [len(marks(svg)) for svg in drawings(html, "compute")] == [2, 2]
    nothing = comparison_html(comparison(wholly))
    assert "No accuracy was measured" in Page(nothing).prose


def test_finding_is_computed() -> None:
    small, large = row(1, 0.3, 1024), row(2, 1.0, 8192)
    small["mechanism"] = large["mechanism"] = "linear"
    data = comparison(row(0, 1.0, 65536), small, large, row(3, 0.07, 2048))
    text = finding(read_comparison(data)).striptags().replace("\u202f", " ")
    assert text.startswith("2 of 4 variants of 3 mechanisms reach 99 % on held-out data of recall")
    assert "method_2(width=2) decodes with the smallest state: 8 KiB, against 64 KiB" in text
    assert "With a state 8× larger, linear rises from 30.0 % to 100.0 %." in text
    assert "method_3(width=3) stays no more than five points above chance." in text
    failing = finding(read_comparison(comparison(row(0, 0.5, 64), row(1, 0.4, 64))))
    assert "None of the 2 mechanisms reaches" in failing


def test_validation_decides_what_is_solved() -> None:
    nearly = row(0, 0.985, 4096) | {"steps_to_99": 75}
    data = comparison(nearly, row(1, 0.2, 4096))
    assert finding(read_comparison(data)).startswith("1 of 2 mechanisms reaches")


def test_table_works_without_script_and_sorts_with_it() -> None:
    seen = Page(comparison_html(some()))
    assert len(seen.named("button")) == 8
    assert all(b["type"] == "button" for b in seen.named("button"))
    assert [t.get("aria-sort") for t in seen.named("th")].count("descending") == 1
    accuracies = [
        float(str(c["data-value"])) for c in seen.named("td") if "accuracy" in str(c.get("class"))
    ]
    assert accuracies == sorted(accuracies, reverse=True)
    assert all(s.get("aria-label") or s.get("aria-hidden") for s in seen.named("svg"))
    anchors = {a["id"] for _, a in seen.tags if "id" in a}
    assert {str(a["href"])[1:] for a in seen.named("a") if str(a["href"])[0] == "#"} <= anchors


def test_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    write_comparison(some(), target)
    assert target.read_text(encoding="utf-8") == comparison_html(some())
    broken = some()
    del broken["rows"][1]["label"]
    with pytest.raises(ArgumentError, match=r"comparison\.rows\.1\.label"):
        write_comparison(broken, target)
    assert target.read_text(encoding="utf-8") == comparison_html(some())
    with pytest.raises(ArgumentError, match="path"):
        write_comparison(some(), tmp_path / "nowhere" / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "regard.comparison/2"}, r"comparison\.schema"),
        ({"rows": []}, r"comparison\.rows"),
        ({"chance": 2.0}, r"comparison\.chance"),
        ({"seconds": "long"}, r"comparison\.seconds"),
    ],
)
def test_wrong_input_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        comparison_html(some() | change)


def test_page_refuses_a_missing_name() -> None:
    with pytest.raises(Exception, match="undefined"):
        page("comparison.html.j2", {})


def test_units_read_well() -> None:
    def plain(text: str) -> str:
        return text.replace("\u202f", " ")

    sizes = [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (2**20 - 1, "1 MiB")]
    assert [plain(byte_size(n)) for n, _ in sizes] == [text for _, text in sizes]
    counts = [(950, "950"), (999_999, "1 M"), (1.31e12, "1.31 T"), (123_456, "123 k")]
    assert [plain(amount(n)) for n, _ in counts] == [text for _, text in counts]
    times = [(0.25, "0.25 s"), (60, "1 min"), (252, "4 min 12 s"), (90_061, "1 d 1 h")]
    assert [plain(duration(n)) for n, _ in times] == [text for _, text in times]
    assert plain(percent(0.9936)) == "99.4 %"
    assert [plain(short_percent(x)) for x in (0.1, 0.125)] == ["10 %", "12.5 %"]


def test_axes_stay_readable() -> None:
    one = log_axis([4096], byte_size, base=2)
    assert one.high / one.low == pytest.approx(4)
    long = log_axis([1e3, 1e15], amount)
    assert 3 <= len(long.ticks) <= 8
    assert all(long.low <= tick.value <= long.high for tick in long.ticks)
    assert [tick.value for tick in accuracy_axis(0.93).ticks] == pytest.approx(
        [0.8, 0.85, 0.9, 0.95, 1]
    )
    assert accuracy_axis(0.3).low == 0


def test_label_without_room_is_left_out() -> None:
    tight = Scene((), (), Box(0, 0, 100, 20))
    wanted = [Wanted(10, 10, 70, 12), Wanted(12, 10, 70, 12), Wanted(50, 10, 300, 12)]
    placed = place(wanted, tight)
    assert [spot is None for spot in placed].count(True) >= 1
    assert placed[2] is None
    assert Segment(0, 0, 10, 10).crosses(Box(4, 4, 6, 6))
    assert not Segment(0, 0, 10, 0).crosses(Box(4, 4, 6, 6))
    assert Segment(0, 0, 10, 10).meets(Segment(0, 10, 10, 0))


def test_curve_of_a_run_that_ended_early_keeps_its_value() -> None:
    from regard.report.axes import step_axis
    from regard.report.curves import PanelFrame

    frame = PanelFrame(step_axis(100), accuracy_axis(0), Box(0, 0, 100, 100))
    drawn = panel(frame, [[(0, 0.0), (50, 1.0)], [(0, 0.0), (100, 1.0)]], [False, False], None)
    assert drawn.mean == "M0 100L50 25L100 0"
    assert drawn.band.endswith("z")
    assert panel(frame, [[]], [True], None).mean == ""


def test_code_in_backticks_is_escaped() -> None:
    assert code("a `b<c>` d") == "a <code>b&lt;c&gt;</code> d"
    assert code("one ` only <b>") == "one ` only &lt;b&gt;"
