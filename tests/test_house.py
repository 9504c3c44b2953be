"""The law of the house, read from the source: imports, sizes, duplicates, side effects."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from regard.core.catalog import cards

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "regard"
FILES = sorted(SOURCE.rglob("*.py"))

PARTS = {"masks", "scores", "features", "importance"}
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    **{part: {"core", *PARTS} for part in PARTS},
    "operators": {"core", *PARTS},
    "layers": {"core", *PARTS, "operators"},
    "build": {"core", "layers"},
    "backbones": {"core", *PARTS, "operators", "layers", "build"},
    "tasks": {"core"},
    "treatments": {"core", *PARTS, "operators"},
    "probes": {"core", *PARTS, "operators", "treatments", "lenses"},
    "lenses": {"core", *PARTS},
    "studies": {
        "core",
        *PARTS,
        "operators",
        "layers",
        "build",
        "backbones",
        "tasks",
        "probes",
        "lenses",
        "treatments",
        "recipes",
        "plan",
        "pocket",
        "searchers",
    },
    "atlases": {"core"},
    "plan": {"core"},
    "searchers": {
        "core",
        *PARTS,
        "plan",
        "layers",
        "probes",
        "lenses",
        "atlases",
        "tasks",
        "treatments",
        "recipes",
    },
    "hosts": {"core", "plan"},
    "recipes": {
        "core",
        *PARTS,
        "operators",
        "layers",
        "tasks",
        "treatments",
        "plan",
        "probes",
    },
    "pocket": {"core", "tasks", "recipes"},
    "report": {"core", *PARTS, "layers", "build", "atlases"},
    "bench": {
        "core",
        *PARTS,
        "layers",
        "build",
        "backbones",
        "tasks",
        "plan",
        "pocket",
        "report",
        "searchers",
        "atlases",
    },
    "testing": {"core", *PARTS, "operators", "layers", "build", "plan"},
    "cli": {
        "core",
        "layers",
        "build",
        "backbones",
        "tasks",
        "plan",
        "atlases",
        "bench",
        "report",
        "testing",
    },
}
OPEN_ENDED = {"create", "task", "but", "call"}
"""Functions whose keywords are options by name, or fields of a record. (A host's functions take
what the library it serves passes on.)
"""
FORBIDDEN_NAMES = {"utils", "common", "helpers", "misc", "base"}


def room(path: Path) -> str:
    parts = path.relative_to(SOURCE).parts
    return parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node


def outermost(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Functions and methods that stand in no other function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield node
        else:
            yield from outermost(node)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_file(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    own = room(path)
    if own != "__init__":
        targets = {m.split(".")[1] for m in imported(tree) if m.startswith("regard.")}
        strangers = targets - ALLOWED[own] - {own}
        assert not strangers, f"{own} must not import {strangers}"
    assert path.stem not in FORBIDDEN_NAMES
    assert len(text.splitlines()) <= 250, "a file over 250 lines holds more than one idea"
    for function in functions(tree):
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length <= 60, f"{function.name} has {length} lines"
        arguments = function.args
        names = [a.arg for a in arguments.args]
        count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
        assert count - (names[:1] == ["self"]) <= 10, f"{function.name} takes {count} arguments"
        open_ended = own == "hosts" or function.name in OPEN_ENDED
        assert arguments.kwarg is None or open_ended, function.name


def test_no_two_functions_share_six_lines() -> None:
    """No run of six statements' text stands in two functions."""
    seen: dict[str, str] = {}
    clashes = []
    for path in FILES:
        for function in outermost(ast.parse(path.read_text())):
            body = [line for node in function.body for line in ast.unparse(node).splitlines()]
            body = [
                line.strip()
                for line in body
                if not line.strip().startswith(('"""', "'''", "'", '"'))
            ]
            where = f"{path.relative_to(SOURCE)}:{function.name}"
            for start in range(len(body) - 5):
                key = "\n".join(body[start : start + 6])
                other = seen.setdefault(key, where)
                if other != where:
                    clashes.append(f"{where} repeats {other}")
    assert not clashes, "\n".join(sorted(set(clashes)))


def test_import_does_nothing_else() -> None:
    """Importing regard imports no method, no host, no command line, and prints nothing."""
    code = (
        "import sys, regard\n"
        "loaded = [m for m in sys.modules if m.startswith('regard.')]\n"
        "assert not loaded, loaded\n"
        "assert 'transformers' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""


def test_public_names_resolve() -> None:
    import regard

    for name in dir(regard):
        assert getattr(regard, name) is not None


@pytest.mark.parametrize("name", cards())
def test_card_is_complete(name: str) -> None:
    entry = cards()[name]
    assert entry.name.isidentifier()
    assert entry.name == entry.name.lower()
    assert entry.doc, "the method file needs a docstring with its formula"
    assert len(entry.summary) < 240
    assert entry.papers
    assert entry.evidence in ("golden", "exact"), "text alone is not evidence"
    assert entry.claim.command.startswith("regard ")
    for pattern in entry.patterns:
        assert pattern in ("noncausal self", "causal self", "noncausal cross", "causal cross")


def test_tables_are_up_to_date() -> None:
    from regard.report.methods import PAGES, with_status

    for name, made in PAGES.items():
        assert (ROOT / "docs" / name).read_text() == made(), "run `make docs`"
    readme = (ROOT / "README.md").read_text()
    assert readme == with_status(readme), "run `make docs`"
