"""`evaluate`: what plans do to a model's quality, cache and speed, resumed where it was left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from regard.bench.costs import CostConfig, Costs, measure_costs
from regard.bench.evaluation import Evaluation, Inquiry, Sheet, SheetConfig, Task
from regard.bench.evaluation_rows import assembled
from regard.bench.examining import Asked, Examining, exam
from regard.bench.exams import Exam
from regard.bench.launching import Here, Launcher
from regard.bench.record import read_record, write_json
from regard.bench.store import Store
from regard.bench.subject import Subject
from regard.bench.sweep import Progress, Watch
from regard.bench.text_exams import Source
from regard.core.errors import ArgumentError, RegardError
from regard.plan import Plan
from regard.tasks.corpus import corpus

Exams = Mapping[tuple[int, Task], Exam]


def unwatched(progress: Progress) -> None:
    """The watch of a caller who does not look."""


def evaluate(
    inquiry: Inquiry,
    subject: Subject,
    out: Path,
    *,
    command: str = "",
    watch: Watch = unwatched,
    launcher: Launcher | None = None,
) -> Evaluation:
    """Set every exam that `out` does not hold yet, measure costs, and put all side by side.

    Everything is checked before anything runs: that plans fit the model, that tasks fit the
    lengths, and what the folder holds. Sheets are kept in OUT/sheets and costs in OUT/costs as they
    finish, the result in OUT/evaluation.json. What `watch` raises ends the evaluation, and the next
    call goes on from what is finished. launcher: where exams run, in this process if None; costs
    are measured here, when nothing else runs.

    Raises:
        ArgumentError: a value or result folder that cannot be used; it is named.
        PlanError, UnsupportedError: a plan that does not fit the model; it is named.
        LostError: exams whose workers were killed; all others are finished.
    """
    exams = checked(inquiry, subject)
    work = _Work(inquiry, subject, exams, out)
    result = out / "evaluation.json"
    if result.exists():
        read_record(result, Evaluation)
    sheets, costs = work.missing_sheets(), work.missing_costs()
    total = len(inquiry.lengths) * (len(work.plans) * len(inquiry.tasks) + 1)
    done = total - len(sheets) - len(costs)
    examining = Examining(inquiry, subject, (out / "sheets").absolute())

    def told(asked: Asked, value: object) -> None:
        watch(Progress(done, total, examining.name(asked)))

    for _, sheet in (launcher or Here()).map(examining, sheets, told):
        work.sheet_store.take(sheet)
        done += 1
    for config in costs:
        watch(Progress(done, total, f"costs at {config.length}"))
        work.measure(config)
        done += 1
    watch(Progress(total, total))
    evaluation = assembled(inquiry, work.sheets(), work.costs(), work.record, command)
    write_json(result, evaluation)
    return evaluation


def checked(inquiry: Inquiry, subject: Subject) -> Exams:
    """The exams of an inquiry, after all that can be checked without running the model.

    Raises:
        RegardError: as `evaluate`.
    """
    for named in inquiry.plans:
        try:
            named.plan.resolve(subject.model)
        except RegardError as error:
            error.add_note(f"in {named.label}")
            raise
    corpus("test", inquiry.file)
    most = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(inquiry.lengths) + inquiry.tokens
    if most is not None and longest > most:
        expected = f"at most {most - inquiry.tokens}, with {inquiry.tokens} tokens to decode"
        raise ArgumentError("length", expected, max(inquiry.lengths))
    return {
        (length, task): exam(task, length, inquiry, subject)
        for length in inquiry.lengths
        for task in inquiry.tasks
    }


class _Work:
    """An inquiry into one model, and what its folder holds of it."""

    def __init__(self, inquiry: Inquiry, subject: Subject, exams: Exams, out: Path) -> None:
        self.inquiry, self.subject, self.exams = inquiry, subject, exams
        self.sheet_store = Store(out / "sheets", Sheet)
        self.cost_store = Store(out / "costs", Costs)
        self.record = subject.record()
        named = {p.label: p.plan.model_copy(update={"name": ""}) for p in inquiry.plans}
        self.plans: dict[str, Plan | None] = {"": None, **named}

    def missing_sheets(self) -> list[Asked]:
        """Exams that are not in the folder."""
        return [
            Asked(label, task, length, config)
            for length in self.inquiry.lengths
            for task in self.inquiry.tasks
            for label, plan in self.plans.items()
            if (config := self._sheet(length, task, plan)).id not in self.sheet_store.records
        ]

    def missing_costs(self) -> list[CostConfig]:
        """Costs that are not in the folder."""
        found = [self._costs(length) for length in self.inquiry.lengths]
        return [config for config in found if config.id not in self.cost_store.records]

    def sheets(self) -> dict[tuple[int, Task], list[Sheet]]:
        """Finished exams by length and task, the model as it is first."""
        return {
            (length, task): [
                self.sheet_store.records[self._sheet(length, task, plan).id]
                for plan in self.plans.values()
            ]
            for length, task in self.exams
        }

    def costs(self) -> dict[int, Costs]:
        """Finished costs by length."""
        return {n: self.cost_store.records[self._costs(n).id] for n in self.inquiry.lengths}

    def measure(self, config: CostConfig) -> None:
        """Measure costs and keep them."""
        opening = self.subject.opening
        text = Source(self.subject, self.inquiry.file).passage(0.5, config.length - len(opening))
        prompt = torch.tensor([opening + text])
        self.cost_store.add(measure_costs(self.subject.model, prompt, config))

    def _sheet(self, length: int, task: Task, plan: Plan | None) -> SheetConfig:
        return SheetConfig(
            model=self.record.fingerprint, plan=plan, task=self.exams[length, task].describe(),
            seed=self.inquiry.seed,
        )  # fmt: skip

    def _costs(self, length: int) -> CostConfig:
        return CostConfig(
            model=self.record.fingerprint, plans=tuple(self.plans.values()), length=length,
            tokens=self.inquiry.tokens, seconds=self.inquiry.seconds,
            threads=torch.get_num_threads(), device=str(self.subject.model.device),
        )  # fmt: skip
