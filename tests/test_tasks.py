"""Tasks: data are what they say they are, repeatable, and split without overlap."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from regard.core.errors import ArgumentError, UnknownNameError, UnsupportedError
from regard.tasks import digits
from regard.tasks.catalog import task, tasks
from regard.tasks.recall import Recall, golden_batches
from regard.tasks.task import IGNORED, SPLITS, Batch, Split, Task, stream_seed

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(os.environ.get("REGARD_GOLDENS", ROOT / ".." / "shared" / "goldens"))


def data_cases() -> Iterator[Any]:
    path = FOLDER / "192_zoology.pt"
    for index, case in (
        enumerate(torch.load(path, weights_only=True)["cases"]) if path.exists() else ()
    ):
        if "cls" not in case["config"]:
            yield pytest.param(case, id=str(index))


@pytest.mark.parametrize("case", list(data_cases()))
def test_recall_is_the_published_data(case: dict[str, Any]) -> None:
    got = golden_batches(case["config"])
    assert set(got) == set(case["outputs"])
    for name, expected in case["outputs"].items():
        assert torch.equal(got[name].to(expected.dtype), expected), name


def small(name: str, **options: Any) -> Task:
    sizes: dict[str, dict[str, Any]] = {
        "recall": {"vocab": 64, "length": 32, "pairs": 6},
        "copying": {"length": 24, "symbols": 6},
    }
    return task(name, **{**sizes.get(name, {}), **options})


def first(
    name: str, split: Split = "train", size: int = 64, seed: int = 0, **options: Any
) -> Batch:
    return next(small(name, **options).batches(split, size, seed))


@pytest.mark.parametrize("fill", ["blank", "noise", "published"])
def test_recall_asks_every_key_once_and_labels_its_value(fill: str) -> None:
    batch = first("recall", fill=fill)
    shown, asked = batch.inputs[:, :12], batch.targets != IGNORED
    assert not asked[:, :12].any()
    assert asked.sum(-1).eq(6).all()
    for row in range(64):
        value_of = dict(zip(shown[row, 0::2].tolist(), shown[row, 1::2].tolist(), strict=True))
        questions = batch.inputs[row][asked[row]].tolist()
        assert sorted(questions) == sorted(value_of)
        assert [value_of[key] for key in questions] == batch.targets[row][asked[row]].tolist()
        assert max(value_of) < 32 <= min(value_of.values())


def test_recall_fills() -> None:
    blank, noise = first("recall"), first("recall", fill="noise")
    rest = blank.inputs == 0
    assert torch.equal(blank.inputs[~rest], noise.inputs[~rest])
    keys = noise.inputs[:, None, 0:12:2]
    repeated = (noise.inputs[..., None] == keys).any(-1) & rest
    assert not repeated.any()
    assert (noise.inputs[rest] != 0).float().mean() > 0.5


def test_recall_gaps_follow_the_power() -> None:
    def early(power: float) -> float:
        batch = first("recall", size=256, length=128, power=power)
        places = torch.arange(128).expand(256, -1)[batch.targets != IGNORED]
        return places.float().mean().item()

    assert early(0.01) < early(0.5) < early(1.0)


@pytest.mark.parametrize("selective", [True, False])
def test_copying_asks_for_the_symbols_in_order(selective: bool) -> None:
    batch = first("copying", selective=selective)
    for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
        assert inputs[inputs > 1].tolist() == targets[targets != IGNORED].tolist()
        assert torch.equal(inputs == 1, targets != IGNORED)
    moved = (batch.inputs > 1).float().std(0).any()
    assert bool(moved) == selective


@pytest.mark.parametrize("name", tasks())
def test_seed_decides_everything(name: str) -> None:
    for split in SPLITS:
        once, again = (list(islice(small(name).batches(split, 16, 3), 3)) for _ in range(2))
        for a, b in zip(once, again, strict=True):
            assert torch.equal(a.inputs, b.inputs)
            assert torch.equal(a.targets, b.targets)
    assert not torch.equal(first(name, seed=3).inputs, first(name, seed=4).inputs)


@pytest.mark.parametrize("name", tasks())
def test_splits_share_no_example(name: str) -> None:
    def examples(split: Split) -> set[bytes]:
        batches = islice(small(name).batches(split, 64), 4)
        return {row.numpy().tobytes() for batch in batches for row in batch.inputs}

    train, valid, test = (examples(split) for split in SPLITS)
    assert len(train) == len(valid) == len(test) == 256
    assert not train & valid
    assert not train & test
    assert not valid & test


def test_streams_of_splits_never_meet() -> None:
    seeds = {
        split: {stream_seed(split, s, i) % 3 for s in range(9) for i in range(9)}
        for split in SPLITS
    }
    assert [seeds[split] for split in SPLITS] == [{0}, {1}, {2}]


@pytest.mark.parametrize("name", tasks())
def test_a_task_says_what_it_is(name: str) -> None:
    subject = small(name)
    batch = first(name, size=8)
    assert subject.name == name
    assert batch.inputs.shape[:2] == (8, subject.length)
    asked = batch.targets[batch.targets != IGNORED]
    assert 0 <= int(asked.min()) <= int(asked.max()) < subject.classes
    if subject.kind == "tokens":
        assert batch.targets.shape == batch.inputs.shape
        assert int(batch.inputs.max()) < subject.vocab
    else:
        assert batch.inputs.shape[2] == subject.channels
        assert batch.targets.shape == (8,)
    assert 0 < subject.chance < 1
    record = subject.describe()
    assert record.pop("task") == name
    assert task(name, **record) == subject


@pytest.mark.parametrize("name", tasks())
def test_valid_and_test_end(name: str) -> None:
    options = {} if name == "digits" else {"examples": 100}
    for split in ("valid", "test"):
        sizes = [len(batch.inputs) for batch in small(name, **options).batches(split, 64)]
        assert sum(sizes) == (100 if options else digits.HELD_OUT)


def test_digits_epochs_use_every_image_once() -> None:
    count = 1797 - 2 * digits.HELD_OUT
    batches = task("digits").batches("train", 5)
    seen = torch.cat([batch.inputs for batch in islice(batches, count // 5)])
    assert len(torch.unique(seen, dim=0)) == len(seen) == count
    assert 0 <= float(seen.min()) < float(seen.max()) <= 1


def test_digits_name_the_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits._images.cache_clear()
    with pytest.raises(UnsupportedError, match=r"regard\[images\]"):
        next(task("digits").batches("train", 4))


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"length": 33}, "length"),
        ({"pairs": 9, "length": 32}, "pairs"),
        ({"pairs": 0}, "pairs"),
        ({"vocab": 16}, "vocab"),
        ({"power": 0.0}, "power"),
        ({"fill": "zeros"}, "fill"),
        ({"examples": 0}, "examples"),
    ],
)
def test_recall_refuses(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{argument}"):
        task("recall", **options)


@pytest.mark.parametrize(
    "options", [{"symbols": 40}, {"symbols": 0}, {"alphabet": 1}, {"examples": 0}]
)
def test_copying_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        task("copying", **options)


def test_names_are_checked() -> None:
    with pytest.raises(UnknownNameError, match="recall"):
        task("recal")
    with pytest.raises(UnknownNameError, match="pairs"):
        task("recall", pair=3)
    requests: list[Any] = [("all", 4, 0), ("train", 0, 0), ("train", 4, -1)]
    for request in requests:
        with pytest.raises(ArgumentError):
            next(Recall().batches(*request))
