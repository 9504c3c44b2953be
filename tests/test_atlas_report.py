"""The page of an atlas: complete, inert, offline, of bounded size, and moved in by keyboard."""

from __future__ import annotations

import base64
import html
import json
import math
import re
import shutil
import subprocess
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_report import HOSTILE, Page

from regard.atlases.example import Example, Span
from regard.atlases.record import Atlas, Row
from regard.core.errors import ArgumentError
from regard.report.atlas import atlas_html, write_atlas_page
from regard.report.atlas_data import bounded, script_json
from regard.report.colours import DIVERGING, SEQUENTIAL, colour
from regard.report.head_types import Bound, Rule, head_types
from regard.report.towers import towers

METRICS = ("sink_first", "previous_token", "induction", "cost_of_zero")
BAD = "</script><img src=x onerror=alert(1)>"
LIMIT = 5_000_000
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
WORDS = ("the", " cat", "\n", BAD, "\u202eabc", "\ud800")


def number(layer: int, head: int, metric: int) -> float:
    return round(math.sin(1 + layer + 7 * head + 3 * metric) / 2 + 0.5, 4)


def example(tower: str, layer: int, head: int) -> Example:
    spans = (
        Span(0, WORDS[:3], (0.1, 0.2, 0.0)),
        Span(90, WORDS[3:], (0.6, 0.05, 0.05)),
    )
    return Example(tower, layer, head, 0, 92, WORDS[5], spans)


def image(tower: str, layer: int, head: int) -> Example:
    words = tuple(str(i) for i in range(6))
    return Example(tower, layer, head, 1, 3, "2", (Span(1, words, (0.5,) + (0.1,) * 5),), (2, 3))


def made(
    layers: int = 3, heads: int = 4, shown: tuple[str, ...] = ("decoder",), model: str = "Model"
) -> Atlas:
    rows = [
        Row(tower, layer, head, f"{metric}{kind}", number(layer, head, i), 8)
        for tower in shown
        for i, metric in enumerate(METRICS)
        for kind in ("", "@code")
        for layer in range(layers)
        for head in range(heads)
    ]
    rows += [
        Row(tower, layer, None, "drift", layer - 1.0, 8) for tower in shown for layer in (0, 1)
    ]
    return Atlas(
        model,
        tuple(rows),
        {f"{tower}/distance": torch.rand(layers, heads, 600) for tower in shown},
        notes={"circuits": "nothing says which tokens matter"},
        meanings={name: f"what `{name}` is" for name in (*METRICS, "drift")},
        examples=tuple(
            kind(tower, layer, 1)
            for tower in shown
            for layer in (0, 1)
            for kind in (example, image)
        ),
        about={"passages": 8, "tokens": 1024, "torch": "2.9"},
    )


def data_of(page: str) -> Any:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


def matrix(text: str, layers: int, heads: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(layers, heads)


def test_every_number_is_in_the_page() -> None:
    page = atlas_html(made())
    (tower,) = data_of(page)["atlases"][0]["towers"]
    for i, metric in enumerate(METRICS):
        for name in (metric, f"{metric}@code"):
            found = matrix(tower["values"][name], 3, 4)
            expected = [[number(layer, head, i) for head in range(4)] for layer in range(3)]
            assert found == pytest.approx(np.array(expected), abs=1e-7)
            assert tower["counts"][name] == 8
    prose = Page(page).prose
    for text in ("nothing says which tokens matter", "what sink_first is", "1,024", "drift"):
        assert text in prose
    assert data_of(page)["ablations"] == ["cost_of_zero"]


def test_page_needs_no_network_and_runs_one_script() -> None:
    page = atlas_html(made())
    seen = Page(page)
    (policy,) = [str(m["content"]) for m in seen.named("meta") if m.get("http-equiv")]
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = b64encode(sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert len(seen.named("script")) == 2, "one that runs, one of data"
    for tag, attributes in seen.tags:
        for name, value in attributes.items():
            assert name not in ("style", "src")
            assert not name.startswith("on")
            if name == "href" and tag != "a":
                assert value == "data:,"
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|innerHTML|eval\(", page)
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", script))
    assert addresses <= {"http://www.w3.org/2000/svg"}


def test_hostile_text_is_inert() -> None:
    plain = made(model=HOSTILE, shown=(HOSTILE, BAD))
    bad = replace(
        plain,
        rows=(
            *plain.rows,
            Row(HOSTILE, 0, 0, BAD, 1.0, 2),
            Row(HOSTILE, 0, None, f"l{BAD}", 1.0, 2),
        ),
        notes={BAD: HOSTILE},
        meanings={**plain.meanings, BAD: HOSTILE},
        about={BAD: [HOSTILE]},
    )
    for page in (atlas_html(bad), atlas_html(bad, made(shown=(HOSTILE, BAD)))):
        seen = Page(page)
        assert len(seen.named("script")) == 2
        assert not seen.named("img")
        assert not any(name.startswith("on") for _, attributes in seen.tags for name in attributes)
        assert data_of(page)["atlases"][0]["words"] == [*WORDS[:5], "\ud800", "2"]
        page.encode("utf-8")


def test_data_closes_no_element() -> None:
    text = script_json({"a": "</script><!-- &amp; \u2028"})
    assert not set(text) & set("<>&\u2028")
    assert json.loads(text) == {"a": "</script><!-- &amp; \u2028"}


def test_heads_are_linked_by_their_anchors() -> None:
    links = [str(a["href"]) for a in Page(atlas_html(made())).named("a")]
    assert "#L2.H3" in links
    several = Page(atlas_html(made(shown=("text encoder", "decoder"))))
    assert "#text%20encoder.L0.H1" in [str(a["href"]) for a in several.named("a")]
    rows = {str(row["id"]) for row in several.named("tr") if "id" in row}
    assert len(rows) == 2 * 3 * 4, "without a script, links lead to rows of a table"
    anchors = {str(a["href"])[1:] for a in several.named("a") if str(a["href"]).startswith("#")}
    assert anchors - {"main", "notes-title-1"} <= rows


def test_types_follow_their_rules() -> None:
    (tower,) = towers(made())
    kinds = {kind.rule.name: kind for kind in head_types(tower)}
    sinks = {(at // 4, at % 4) for at in range(12) if number(at // 4, at % 4, 0) >= 0.5}
    assert set(kinds["sink"].heads) == sinks
    assert kinds["retrieval"].lacks == ("retrieval",)
    assert "not measured: retrieval" in Page(atlas_html(made())).prose
    rule = Rule("odd", "is odd", (Bound("induction", 0.5), Bound("sink_first", 0.5, below=True)))
    (odd,) = head_types(tower, [rule])
    for layer, head in odd.heads:
        assert number(layer, head, 2) >= 0.5 > number(layer, head, 0)
    assert rule.text == "induction ≥ 0.5 and sink_first < 0.5"


def test_what_was_not_measured_is_no_number() -> None:
    plain = made()
    rows = tuple(replace(r, value=math.nan, n=0) if r.layer == 0 else r for r in plain.rows)
    page = atlas_html(replace(plain, rows=rows))
    (tower,) = data_of(page)["atlases"][0]["towers"]
    assert np.isnan(matrix(tower["values"]["induction"], 3, 4)[0]).all()
    assert all(
        layer
        for kind in head_types(towers(replace(plain, rows=rows))[0])
        for layer, _ in kind.heads
    )


def test_an_atlas_of_layers_alone() -> None:
    plain = made()
    rows = tuple(row for row in plain.rows if row.head is None)
    page = atlas_html(replace(plain, rows=rows, profiles={}, examples=()))
    assert "drift" in Page(page).prose


def test_comparison_shows_both_and_what_changed() -> None:
    first = made(model="Before")
    rows = tuple(
        replace(r, value=r.value + 0.5) if (r.layer, r.head, r.metric) == (1, 2, "induction") else r
        for r in first.rows
    )
    page = atlas_html(first, replace(first, model="After", rows=rows))
    assert data_of(page)["labels"] == ["Before", "After"]
    assert len(data_of(page)["atlases"]) == 2
    prose = Page(page).prose
    assert "Before and After" in prose
    changed = prose.split("Heads that changed most", 1)[1]
    assert re.search(r"Most of all ?1\.2", changed), "the changed head comes first"
    assert f"induction {number(1, 2, 2):.3g} → {number(1, 2, 2) + 0.5:.3g}" in changed
    alike = data_of(atlas_html(first, first))["labels"]
    assert alike == ["Before (first)", "Before (second)"]
    with pytest.raises(ArgumentError, match="in common"):
        atlas_html(first, made(shown=("encoder",)))


def test_a_large_atlas_gives_a_page_of_bounded_size() -> None:
    layers, heads, long = 100, 64, 40
    values = torch.rand(long, layers, heads).tolist()
    rows = tuple(
        Row("decoder", layer, head, f"metric_{i}", values[i][layer][head], 16)
        for i in range(long)
        for layer in range(layers)
        for head in range(heads)
    )
    spans = tuple(Span(9 * i, ("word",) * 40, (0.1234,) * 40) for i in range(4))
    shown = tuple(
        Example("decoder", layer, head, 0, 99, "word", spans)
        for layer in range(layers)
        for head in range(heads)
    )
    profiles = {"decoder/distance": torch.rand(layers, heads, 300)}
    page = atlas_html(Atlas("Model", rows, profiles, examples=shown))
    assert len(page) < LIMIT
    assert "Too many for a table" in page
    assert data_of(page)["atlases"][0]["left"] > 0


def test_the_strongest_examples_are_kept_for_every_head() -> None:
    every = [example("decoder", layer, 0) for layer in (0, 1) for _ in range(3)]
    kept, left = bounded(every, shown=4 * 6)
    assert [one.layer for one in kept] == [0, 1, 0, 1]
    assert left == 2
    assert bounded(every) == (every[::3] + every[1::3] + every[2::3], 0)


def test_long_profiles_are_averaged() -> None:
    plain = made()
    page = atlas_html(replace(plain, profiles={"decoder/distance": torch.ones(3, 4, 1000)}))
    (profile,) = data_of(page)["atlases"][0]["towers"][0]["profiles"]
    points = np.frombuffer(base64.b64decode(profile["points"]), "<f4")
    assert profile["step"] == 4
    assert points.size == 12 * 250
    assert (points == 1).all()


def test_scales_grow_darker() -> None:
    def light(fill: str) -> float:
        return sum(w * int(fill[i : i + 2], 16) for w, i in ((0.21, 1), (0.72, 3), (0.07, 5)))

    steps = [light(colour(i / 40)) for i in range(41)]
    assert steps == sorted(steps, reverse=True)
    assert light(colour(0.5, DIVERGING)) > max(
        light(colour(0, DIVERGING)), light(colour(1, DIVERGING))
    )
    assert colour(-1) == SEQUENTIAL[0]
    assert colour(2) == SEQUENTIAL[-1]


def test_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_atlas_page(made(), tmp_path / "atlas.html", made(model="Other"))
    assert "Model and Other" in (tmp_path / "atlas.html").read_text(encoding="utf-8")
    with pytest.raises(ArgumentError, match="path"):
        write_atlas_page(made(), tmp_path / "nowhere" / "atlas.html")


ACTING = """
const said = [];
addEventListener("securitypolicyviolation", (e) => said.push("policy " + e.violatedDirective));
addEventListener("error", (e) => said.push("error " + e.message));
const say = () => said.push([location.hash, readout.textContent.split(" · ").slice(0, 2).join(" "),
  document.querySelector("#head h2")?.textContent, overview.hidden].join("|"));
const press = (key) => (document.activeElement ?? document.body).dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
HTMLAnchorElement.prototype.click = function () {
  said.push(this.download + " " + this.href.slice(0, 18));
};
(async () => {
  const opened = !overview.hidden;
  if (opened) {
    maps.querySelector('a[tabindex="0"]').focus();
    const keys = ["ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown", "]", "]", "["];
    for (const key of keys) press(key);
    say();
    for (const tool of maps.querySelectorAll(".tool")) tool.click();
    await pause(600);
    press("Enter");
    await pause(50);
  }
  say();
  press("ArrowRight");
  await pause(50);
  say();
  press("Escape");
  await pause(50);
  say();
  history.back();
  await pause(50);
  say();
  const out = document.createElement("pre");
  out.id = "said";
  out.textContent = said.join("\\n");
  document.body.append(out);
})();
"""


def acted(page: str, folder: Path, anchor: str = "") -> list[str]:
    """What happens in a browser, under the page's own policy, when keys are pressed."""
    digest = b64encode(sha256(ACTING.encode()).digest()).decode()
    page = page.replace("script-src ", f"script-src 'sha256-{digest}' ")
    page = page.replace("</body>", f"<script>{ACTING}</script></body>")
    (folder / "page.html").write_text(page, encoding="utf-8")
    if CHROMIUM is None:
        pytest.skip("NO CHROMIUM: the page was not tried in a browser")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000")
    address = f"{(folder / 'page.html').as_uri()}{anchor}"
    profile = f"--user-data-dir={folder / 'profile'}"
    run = subprocess.run(
        [CHROMIUM, *flags, profile, "--dump-dom", address],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    (said,) = re.findall(r'<pre id="said">(.*?)</pre>', run.stdout, re.S)
    return html.unescape(said).splitlines()


def test_keys_move_over_heads_and_open_them(tmp_path: Path) -> None:
    said = acted(atlas_html(made()), tmp_path)
    assert said == [
        f"|L1.H1 cost_of_zero {number(1, 1, 3):.3g}||false",
        "Model_cost_of_zero.svg data:image/svg+xml",
        "Model_cost_of_zero.png data:image/png;bas",
        f"#L1.H1|L1.H1 cost_of_zero {number(1, 1, 3):.3g}|Layer 1, head 1|true",
        f"#L1.H2|L1.H1 cost_of_zero {number(1, 1, 3):.3g}|Layer 1, head 2|true",
        f"#map|L1.H2 cost_of_zero {number(1, 2, 3):.3g}|Layer 1, head 2|false",
        f"#L1.H2|L1.H2 cost_of_zero {number(1, 2, 3):.3g}|Layer 1, head 2|true",
    ]


def test_a_link_opens_the_page_of_its_head(tmp_path: Path) -> None:
    both = ("text encoder", BAD)
    page = atlas_html(made(shown=both), made(shown=both, layers=2))
    said = acted(page, tmp_path, "#text%20encoder.L2.H0")
    titles = [line.split("|")[2] for line in said]
    assert titles == [f"Layer 2, head {h} · text encoder" for h in (0, 1, 1, 1)]
    assert [line.split("|")[3] for line in said] == ["true", "true", "false", "true"]
