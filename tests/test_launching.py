"""Launchers: the same records whatever runs them; killed workers, errors and Ctrl-C."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import small_pocket
from test_compare import FLAGS, numbers, study
from typer.testing import CliRunner

import regard
from regard.bench.compare import Progress, Trialling, compare
from regard.bench.comparison import Comparison
from regard.bench.evaluate import evaluate
from regard.bench.evaluation import Inquiry, Named
from regard.bench.fit import fit
from regard.bench.fitting import FitConfig
from regard.bench.launchers import launcher
from regard.bench.launching import Here, Launcher, LostError
from regard.bench.local import Local
from regard.bench.record import read_record
from regard.bench.showing.exhibit import Source
from regard.bench.subject import Subject, load
from regard.bench.surveying import Surveying, surveyed
from regard.bench.trial import Trial, TrialConfig
from regard.cli.main import app
from regard.core.errors import ArgumentError, UnknownNameError, UnsupportedError
from regard.plan import Plan, Step


@pytest.fixture(autouse=True)
def plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers inherit where modules are looked for, but not what other tests told torch so that the
    torchvision beside timm could be imported.
    """
    folder = os.environ.get("REGARD_VISION")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != folder])


@dataclass(frozen=True)
class Marked:
    """A job that notes each start in a folder and is killed, or fails, where it is told to."""

    folder: Path
    fatal: int = -1
    times: int = 10**6
    trips: str = ""

    def name(self, record: int) -> str:
        return f"number {record}"

    def __call__(self, record: int, tell: Callable[[Any], None]) -> tuple[int, int]:
        tell(record / 10)
        starts = len(list(self.folder.glob(f"{record}.*")))
        (self.folder / f"{record}.{starts}").touch()
        if record == self.fatal and starts < self.times:
            os.kill(os.getpid(), signal.SIGKILL)
        if record == self.fatal and self.trips == "regard":
            raise ArgumentError("record", "another", record)
        if record == self.fatal and self.trips == "foreign":
            raise Stubborn(len(self.trips), record)
        return record * record, torch.get_num_threads()


class Stubborn(Exception):
    """An error that cannot be unpickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__("stubborn")


@dataclass(frozen=True)
class KilledOnce(Trialling):
    """Trials, the first of which with softmax is killed on its first start, half done."""

    def __call__(self, config: TrialConfig, tell: Callable[[Any], None]) -> Trial:
        mark = self.folder.parent / "killed"
        if config.mechanism.name == "softmax" and not mark.exists():
            mark.touch()
            (self.folder / f"{config.id}.json.part").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(config, tell)


@dataclass(frozen=True)
class KilledAlways(Trialling):
    def __call__(self, config: TrialConfig, tell: Callable[[Any], None]) -> Trial:
        if config.mechanism.name == "softmax":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(config, tell)


def silent(record: Any, value: Any) -> None:
    pass


def stored(out: Path) -> dict[str, dict[str, Any]]:
    return {
        path.stem: numbers(read_record(path, Trial)) for path in (out / "trials").glob("*.json")
    }


@pytest.fixture(scope="module")
def engine() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # its workers have no tests
    yield
    ray.shutdown()


# Comparisons


def same_files(other: Launcher, out: Path) -> None:
    kwargs: dict[str, Any] = {"mechanisms": "softmax,uniform", "seeds": (0, 1)}
    here = compare(study(**kwargs), out / "here")
    there = compare(study(**kwargs), out / "there", launcher=other)
    assert stored(out / "here") == stored(out / "there")
    assert len(stored(out / "there")) == 4
    assert here.model_copy(update={"seconds": 0.0}) == there.model_copy(update={"seconds": 0.0})


def test_processes_give_the_same_files(tmp_path: Path) -> None:
    with Local(2) as local:
        same_files(local, tmp_path)


def test_a_killed_worker_costs_one_trial_which_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regard.bench.compare.Trialling", KilledOnce)
    seen: list[Progress] = []
    with Local(2) as local:
        found = compare(study(), tmp_path / "there", launcher=local, watch=seen.append)
    assert (tmp_path / "there" / "killed").exists()
    assert seen[-1].done == 2
    monkeypatch.undo()
    assert found.rows == compare(study(), tmp_path / "here").rows
    assert stored(tmp_path / "here") == stored(tmp_path / "there")


def test_a_trial_lost_twice_is_named_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regard.bench.compare.Trialling", KilledAlways)
    lost = pytest.raises(LostError, match=r"2 tries .*softmax, lr 0\.001, seed 0")
    with Local(1) as local, lost as caught:
        compare(study(), tmp_path, launcher=local)
    assert caught.value.names == ("softmax, lr 0.001, seed 0",)
    assert [trial["config"]["mechanism"]["name"] for trial in stored(tmp_path).values()] == [
        "uniform"
    ]
    assert not (tmp_path / "comparison.json").exists()
    monkeypatch.undo()
    assert len(compare(study(), tmp_path).rows) == 2


# Jobs


def test_only_the_killed_record_starts_twice(tmp_path: Path) -> None:
    told: list[tuple[int, float]] = []
    job = Marked(tmp_path, fatal=2, times=1)
    with Local(2) as local:
        found = dict(local.map(job, range(5), lambda record, value: told.append((record, value))))
        (tmp_path / "next").mkdir()
        ids = {child.pid for child in multiprocessing.active_children()}
        list(local.map(Marked(tmp_path / "next"), range(2), silent))
        assert ids <= {child.pid for child in multiprocessing.active_children()}  # they stayed
    assert found == {n: (n * n, 1) for n in range(5)}  # and workers have this process's threads
    starts = sorted(path.name for path in tmp_path.glob("*.*"))
    assert starts == ["0.0", "1.0", "2.0", "2.1", "3.0", "4.0"]
    assert sorted(told) == [(0, 0.0), (1, 0.1), (2, 0.2), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert multiprocessing.active_children() == []


def test_the_number_of_tries(tmp_path: Path) -> None:
    with Local(1, again=2) as local, pytest.raises(LostError, match="number 0"):
        list(local.map(Marked(tmp_path, fatal=0), range(1), silent))
    assert len(list(tmp_path.iterdir())) == 3


def test_errors_cross_whole(tmp_path: Path) -> None:
    with Local(1) as local:
        with pytest.raises(ArgumentError, match="record: expected another, got 1") as caught:
            list(local.map(Marked(tmp_path, 1, 0, "regard"), range(3), silent))
        assert caught.value.argument == "record"
        assert not (tmp_path / "2.0").exists()  # at once
        with pytest.raises(RuntimeError, match="Stubborn: stubborn"):
            list(local.map(Marked(tmp_path, 1, 0, "foreign"), range(1, 2), silent))
    assert multiprocessing.active_children() == []


def test_leaving_early_ends_the_workers(tmp_path: Path) -> None:
    with Local(2) as local:
        running = local.map(Marked(tmp_path), range(3), silent)
        assert next(iter(running))[0] in (0, 1)
        running.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == []


def test_nothing_to_do_starts_nothing(tmp_path: Path) -> None:
    for one in (Here(), Local(2)):
        assert list(one.map(Marked(tmp_path), (), silent)) == []


# Fits and evaluations


def test_a_fit_gives_the_same_numbers_and_files(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("scipy")
    config = FitConfig(
        budget=0.5, lengths=(96,), examples=8, exams=16, rounds=1, seconds=0.0, shares=(0.5, 1.0),
        tokens=2,
    )  # fmt: skip
    subject, found = load("pocket"), []
    here = fit(config, subject, tmp_path / "here")
    with Local(2) as local:
        there = fit(config, subject, tmp_path / "there", launcher=local)
    for one in (here, there):
        scores = [row.scores for row in one.evaluation.rows]
        found.append((one.plan, one.groups, one.predicted, one.measured, one.untouched, scores))
    assert found[0] == found[1]
    for name in ("plan.json", "losses"):
        (one,), (other,) = (list((tmp_path / w).rglob(f"{name}*/*" if name == "losses" else name))
                            for w in ("here", "there"))  # fmt: skip
        assert one.read_text() == other.read_text()
    sheets = [
        {path.name for path in (tmp_path / w / "sheets").iterdir()} for w in ("here", "there")
    ]
    assert sheets[0] == sheets[1]


def test_an_atlas_in_parts_is_the_same(tmp_path: Path) -> None:
    """From another folder too, and whatever comes first."""
    pytest.importorskip("transformers")
    (tmp_path / "text.txt").write_text("All heads look at what was said before. " * 40)
    probes = ("sinks", "entropy", "ablation")
    sources = (Source(Path("text.txt"), "one"), Source(None, "other"))
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        job = Surveying("pocket", sources, 2, 48, probes, 2)
        with Local(2) as local:
            found = [surveyed(job, one, lambda share, what: None) for one in (Here(), local)]
    assert len(job.survey.parts) == 5
    one, other = found
    assert one.rows == other.rows
    assert one.examples == other.examples
    assert one.notes == other.notes
    assert {m for m in one.metrics if "@" in m}
    for name, profile in one.profiles.items():
        assert torch.equal(profile, other.profiles[name])
    model, passages = job.exhibit.model, job.survey.scene.passages
    plain = regard.atlas(model, passages, probes, examples=2)
    assert plain.rows == one.rows


def test_an_atlas_of_another_model_is_refused() -> None:
    pytest.importorskip("transformers")
    job = Surveying("pocket", (Source(),), 1, 48, ("sinks",), 0, None, "another")
    with pytest.raises(ArgumentError, match="launcher: expected here"):
        surveyed(job, Here(), lambda share, what: None)


def test_the_command_takes_a_launcher_and_says_nothing_of_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    step = Step(treatment="stream", options={"budget": 0.5})
    Plan(steps=(step,)).save(tmp_path / "half.json")
    command = [sys.executable, "-c", "from regard.cli.main import app; app()", "evaluate"]
    command += ["--plan", str(tmp_path / "half.json"), "--task", "needle", "--length", "160"]
    command += [
        "--examples",
        "4",
        "--tokens",
        "2",
        "--seconds",
        "0",
        "--out",
        str(tmp_path / "out"),
    ]
    run = subprocess.run(
        [*command, "--launcher", "local", "--workers", "1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert len(list((tmp_path / "out" / "sheets").iterdir())) == 2
    assert "half" in run.stdout


def test_a_model_that_workers_cannot_find_again_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    subject = Subject("pocket", *small_pocket())
    asked = Inquiry(
        plans=(Named(label="none", plan=Plan()),), tasks=("needle",), lengths=(160,), examples=2
    )
    with Local(1) as local, pytest.raises(ArgumentError, match="launcher: expected here"):
        evaluate(asked, subject, tmp_path, launcher=local)


# Names


def test_launchers_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(launcher(), Here)
    local = launcher("local", 3)
    assert isinstance(local, Local)
    assert local.workers == 3
    with pytest.raises(UnknownNameError, match="did you mean local"):
        launcher("locale")
    with pytest.raises(ArgumentError, match="workers: expected at least 1"):
        launcher("local", 0)
    with pytest.raises(ArgumentError, match="workers: expected a launcher other than here"):
        launcher("here", 2)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'regard\[ray\]'"):
        launcher("ray")


# The command


def started(out: Path) -> subprocess.Popen[bytes]:
    """A comparison of six trials in a process group of its own, after its first finished trial."""
    command = [sys.executable, "-c", "from regard.cli.main import app; app()", "compare", *FLAGS]
    command += ["--mechanisms", "softmax,uniform", "--seeds", "0,1,2", "--threads", "1"]
    command += ["--lrs", "1e-3", "--steps", "200", "--launcher", "local", "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--out", str(out)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list((out / "trials").glob("*.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    return process


def gone(group: int) -> bool:
    """Whether every process of a group ends soon."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("signalled", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "killed"])
def test_what_is_finished_stays(signalled: signal.Signals, tmp_path: Path) -> None:
    process = started(tmp_path)
    if signalled == signal.SIGINT:
        os.killpg(process.pid, signalled)  # as a terminal does: workers get it too
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130
        (line,) = said.decode().splitlines()
        assert "the same command resumes" in line
    else:
        os.kill(process.pid, signalled)
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
    assert gone(process.pid)
    kept = stored(tmp_path)
    assert 0 < len(kept) < 6
    flags = ["--mechanisms", "softmax,uniform", "--seeds", "0,1,2", "--steps", "200"]
    again = CliRunner().invoke(
        app, ["compare", *FLAGS, *flags, "--lrs", "1e-3", "--out", str(tmp_path)]
    )
    assert again.exit_code == 0, again.output
    assert kept.items() <= stored(tmp_path).items()
    assert len(read_record(tmp_path / "comparison.json", Comparison).rows[0].accuracies) == 3


# Ray, where it is installed


@pytest.mark.enable_socket
@pytest.mark.usefixtures("engine")
def test_ray_gives_the_same_files(tmp_path: Path) -> None:
    same_files(launcher("ray", 2), tmp_path)


@pytest.mark.enable_socket
@pytest.mark.usefixtures("engine")
def test_ray_tries_again_and_reports(tmp_path: Path) -> None:
    found = dict(launcher("ray").map(Marked(tmp_path, fatal=1, times=1), range(3), silent))
    assert found == {n: (n * n, 1) for n in range(3)}
    (tmp_path / "more").mkdir()
    kept = []
    with pytest.raises(LostError, match="number 1"):
        kept.extend(launcher("ray").map(Marked(tmp_path / "more", fatal=1), range(3), silent))
    assert sorted(path.name for path in (tmp_path / "more").iterdir()) == [
        "0.0", "1.0", "1.1", "2.0",
    ]  # fmt: skip
    with pytest.raises(ArgumentError, match="record: expected another"):
        list(launcher("ray").map(Marked(tmp_path, 1, 0, "regard"), range(1, 2), silent))


@dataclass(frozen=True)
class Waits(Marked):
    """The same; every record but the first waits, at its first start, for the file `go`."""

    def __call__(self, record: int, tell: Callable[[Any], None]) -> tuple[int, int]:
        result = super().__call__(record, tell)
        while record and not (self.folder / "go").exists():
            time.sleep(0.05)
        return result


@pytest.mark.enable_socket
@pytest.mark.usefixtures("engine")
def test_a_machine_that_is_lost_costs_what_it_was_at(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": torch.get_num_threads()})
    try:
        second = cluster.add_node(num_cpus=torch.get_num_threads())
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
        found: dict[int, tuple[int, int]] = {}
        for record, result in launcher("ray").map(Waits(tmp_path), range(4), silent):
            while not found and len(list(tmp_path.iterdir())) < 3:
                time.sleep(0.05)  # until both machines are at work
            if not found:
                cluster.remove_node(second, allow_graceful=False)
                (tmp_path / "go").touch()
            found[record] = result
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert sorted(found.values()) == [(n * n, torch.get_num_threads()) for n in range(4)]
    starts = [path.name for path in tmp_path.iterdir() if path.suffix == ".1"]
    assert len(starts) == 1
