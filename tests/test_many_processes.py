"""Training on many processes: what each of them learns, sees, tells and writes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from regard.core.errors import ArgumentError, UnsupportedError
from regard.recipes.duo_gates import GateTraining, Moves
from regard.recipes.echo_att import echo_att
from regard.recipes.minilm import minilm
from regard.recipes.training import Progress, own_batches, trained
from regard.recipes.tuning import Tuning, tuned
from regard.searchers.vtrans import Bottleneck, Gating, vtrans
from regard.tasks.task import Batch
from regard.testing.tiny import prompt, tiny_decoder

RATE = 1e-3
SCRIPT = """
import os
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from accelerate import Accelerator
from test_many_processes import RECIPES, Seen, numbered
from regard.core.errors import ArgumentError
from regard.recipes.tuning import tuned
from regard.testing.tiny import tiny_decoder

folder, state = Path(sys.argv[1]), Accelerator()
assert state.num_processes == 2, state.num_processes
for name in sys.argv[2:]:
    with Seen() as seen, (folder / "told").open("a") as told:
        def watch(progress):
            print(name, progress.done, sum(progress.losses.values()), file=told)
        model = RECIPES[name](numbered(), watch)
    torch.save([model.state_dict(), seen.numbers], folder / f"{name}{state.process_index}")
try:
    tuned(tiny_decoder(), [{"input_ids": torch.ones(1, 4).long()}] * 3, 2)
except ArgumentError as error:
    (folder / f"error{state.process_index}").write_text(str(error))
state.end_training()
os._exit(0)  # all is done; torch's own threads may otherwise abort a process at its end
"""


def numbered() -> Iterator[dict[str, Tensor]]:
    """A stream of batches whose number is their first token, without end."""
    for number in range(32):
        ids = prompt(8, batch=2, seed=number)
        ids[:, 0] = number
        yield {"input_ids": ids}


def joined(by: int) -> Iterator[dict[str, Tensor]]:
    """The same stream in batches `by` times as large."""
    stream = numbered()
    while together := [batch["input_ids"] for batch in islice(stream, by)]:
        yield {"input_ids": torch.cat(together)}


class Seen:
    """A context that notes the numbers of the batches that any lesson is given."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __enter__(self) -> Seen:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            outer = isinstance(module, nn.parallel.DistributedDataParallel)
            if args and isinstance(args[0], Mapping) and not outer:
                self.numbers.append(int(args[0]["input_ids"][0, 0]))

        self.handle = nn.modules.module.register_module_forward_pre_hook(note)
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def tuning(stream: Any, watch: Any) -> Any:
    return tuned(tiny_decoder(), stream, 3, rate=RATE, watch=watch)


def thin(stream: Any, watch: Any) -> Any:
    """Matrices whose start differs from process to process, unless the first one's is taken."""
    torch.manual_seed(7 + int(os.environ.get("RANK", "0")))
    return tuned(tiny_decoder(), stream, 3, rank=2, rate=RATE, watch=watch)


def sharing(stream: Any, watch: Any) -> Any:
    """Two trainings on one stream, with a teacher and weights that learn nothing."""
    return echo_att(tiny_decoder(), ((0, 1),), stream, 2, adjusting=2, rate=RATE, watch=watch).model


def relations(stream: Any, watch: Any) -> Any:
    """A lesson that leaves parts of the model without gradients."""
    student = tiny_decoder(seed=3)
    return minilm(tiny_decoder(), student, stream, 2, assistant=False, rate=RATE, watch=watch)


def gates(stream: Any, watch: Any) -> Any:
    """A lesson with parameters of its own, whose noise is the same for all processes."""
    return vtrans(tiny_decoder(), stream, 4, 0.3, watch=watch).model


def opening(stream: Any, watch: Any) -> Any:
    """A lesson of nothing but gates, around a model that learns nothing."""
    lesson = GateTraining(tiny_decoder(), sinks=1, recent=2)

    def told(moved: Moves) -> None:
        if watch is not None:
            watch(Progress(moved.done, {"distance": moved.distance}))

    lesson.run((Batch(x["input_ids"], x["input_ids"]) for x in stream), 3, told)
    return lesson


RECIPES = {f.__name__: f for f in (tuning, thin, sharing, relations, gates, opening)}
"""Training by a stream and who watches."""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left, after every recipe."""
    return launch(tmp_path_factory.mktemp("two"), *RECIPES)


def launch(folder: Path, *recipes: str, **given: str) -> Path:
    (folder / "script.py").write_text(SCRIPT)
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*start, "script.py", str(folder), *recipes],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        cwd=folder,
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": str(Path(__file__).parent),
            **given,
        },
    )
    assert done.returncode == 0, done.stderr
    return folder


def left(folder: Path, name: str) -> tuple[list[dict[str, Tensor]], list[list[int]]]:
    """Weights and numbers of batches, by process."""
    both = [torch.load(folder / f"{name}{i}", weights_only=True) for i in range(2)]
    return [weights for weights, _ in both], [numbers for _, numbers in both]


def close(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], atol: float = 1e-7) -> None:
    assert given.keys() == wanted.keys()
    for name, weight in given.items():
        torch.testing.assert_close(weight, wanted[name], atol=atol, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_processes_learn_the_same(launched: Path, name: str) -> None:
    (one, other), _ = left(launched, name)
    assert all(torch.equal(weight, other[key]) for key, weight in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tuning", "sharing", "relations", "opening"])
def test_two_processes_do_what_one_does_on_batches_twice_as_large(
    launched: Path, name: str
) -> None:
    (weights, _), _ = left(launched, name)
    close(weights, RECIPES[name](joined(2), None).state_dict())
    once = RECIPES[name](numbered(), None).state_dict()
    assert any(not torch.allclose(once[key], x, atol=1e-6) for key, x in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps"), [("tuning", 3), ("sharing", 4), ("gates", 4), ("opening", 3)]
)
def test_no_batch_is_lost_or_seen_twice(launched: Path, name: str, steps: int) -> None:
    _, (one, other) = left(launched, name)
    assert one == list(range(0, 2 * steps, 2))
    assert other == list(range(1, 2 * steps, 2))


@pytest.mark.slow
def test_progress_is_told_once(launched: Path) -> None:
    lines = [line.split() for line in (launched / "told").read_text().splitlines()]
    three = {name: [1, 2, 3] for name in ("tuning", "thin", "opening")}
    steps = {**three, "sharing": [1, 2, 1, 2]}
    for name, expected in (steps | {"relations": [1, 2], "gates": [1, 2, 3, 4]}).items():
        assert [int(step) for who, step, _ in lines if who == name] == expected


@pytest.mark.slow
def test_too_few_batches_are_told_by_all(launched: Path) -> None:
    """Three batches are one step of two processes: both stop, and none waits for the other."""
    told = [(launched / f"error{i}").read_text() for i in range(2)]
    assert told[0] == told[1]
    assert "batches" in told[0]


@pytest.mark.slow
def test_batches_are_gathered_on_many_processes(tmp_path: Path) -> None:
    """Two batches for each of two processes are one step on all four."""
    launch(tmp_path, "tuning", ACCELERATE_GRADIENT_ACCUMULATION_STEPS="2")
    (one, other), numbers = left(tmp_path, "tuning")
    close(one, other, atol=0.0)
    close(one, tuning(joined(4), None).state_dict())
    assert sorted(chain(*numbers)) == list(range(12))


@pytest.mark.slow
def test_mixed_precision_on_many_processes(tmp_path: Path) -> None:
    launch(tmp_path, "tuning", ACCELERATE_MIXED_PRECISION="bf16")
    (one, other), _ = left(tmp_path, "tuning")
    close(one, other, atol=0.0)
    wanted = tuning(joined(2), None).state_dict()
    assert {x.dtype for x in one.values()} == {x.dtype for x in wanted.values()}
    assert any(not torch.equal(x, wanted[name]) for name, x in one.items())
    close(one, wanted, atol=3 * RATE)


@pytest.mark.parametrize("many", [1, 3])
def test_batches_are_gathered(monkeypatch: pytest.MonkeyPatch, many: int) -> None:
    """A step on several batches is one on all of them joined, and is told once."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(many))
    seen: list[Progress] = []
    model = tuning(numbered(), seen.append)
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    wanted: list[Progress] = []
    close(model.state_dict(), tuning(joined(many), wanted.append).state_dict())
    assert [one.done for one in seen] == [1, 2, 3]
    for one, other in zip(seen, wanted, strict=True):
        assert one.losses["hard"] == pytest.approx(other.losses["hard"], rel=1e-6)


def test_a_step_of_several_batches_needs_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    batch = {"input_ids": prompt(8)}
    tuned(tiny_decoder(), [batch] * 4, 2)
    with pytest.raises(ArgumentError, match="2 steps"):
        tuned(tiny_decoder(), [batch] * 3, 2)


def test_a_lesson_is_told_which_step_it_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not how many forwards it has seen."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    model, steps = tiny_decoder(), []
    lesson = Gating(model, None, Bottleneck(), 0.5, 2, 0)
    lesson.register_forward_pre_hook(lambda module, args: steps.append(lesson.done))
    trained(lesson, repeat({"input_ids": prompt(8)}), 3, rate=RATE)
    assert steps == [0, 0, 1, 1, 2, 2]


def test_old_gradients_teach_nothing() -> None:
    models = [tiny_decoder(), tiny_decoder()]
    for parameter in models[1].parameters():
        parameter.grad = torch.ones_like(parameter)
    for model in models:
        tuned(model, numbered(), 1, rate=RATE)
    close(models[0].state_dict(), models[1].state_dict(), atol=0.0)
    assert all(p.grad is None for p in models[1].parameters())


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_stream_goes_on_where_all_left_it(processes: int) -> None:
    streams = [numbered() for _ in range(processes)]
    found: list[int] = []
    for _ in range(2):
        for process, stream in enumerate(streams):
            own = islice(own_batches(stream, process, processes), 3)
            found += [int(batch["input_ids"][0, 0]) for batch in own]
    assert sorted(found) == list(range(6 * processes))
    assert len(list(own_batches([{}] * 7, 0, 3))) == len(list(own_batches([{}] * 7, 2, 3))) == 2


def test_split_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    before = copy.deepcopy(tiny_decoder().state_dict())
    model = tiny_decoder()
    with pytest.raises(UnsupportedError, match="FSDP"):
        trained(Tuning(model), numbered(), 1, rate=RATE)
    close(model.state_dict(), before, atol=0.0)
