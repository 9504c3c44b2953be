"""Rows and notes of an evaluation, from its finished exams and measured costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from regard.bench.book import BUSY
from regard.bench.costs import Cost, Costs
from regard.bench.evaluation import DENSE, Evaluation, EvaluationRow, Inquiry, Sheet, Task
from regard.bench.machine import hardware, versions
from regard.bench.subject import SubjectRecord
from regard.report.units import percent

SAME_BYTES = 1.05
"""Caches whose bytes differ by a larger factor are told apart."""

Sheets = Mapping[tuple[int, Task], Sequence[Sheet]]


def assembled(
    inquiry: Inquiry,
    sheets: Sheets,
    costs: Mapping[int, Costs],
    subject: SubjectRecord,
    command: str,
) -> Evaluation:
    """The evaluation of an inquiry, from its sheets and costs, the model as it is first in each."""
    rows = tuple(row for n in inquiry.lengths for row in _rows(inquiry, sheets, costs[n], n))
    made = [sheet for found in sheets.values() for sheet in found]
    return Evaluation(
        subject=subject,
        tasks={task: _told(sheets[inquiry.lengths[0], task][0]) for task in inquiry.tasks},
        lengths=inquiry.lengths,
        seed=inquiry.seed,
        tokens=inquiry.tokens,
        rows=rows,
        notes=(*_notes(rows, inquiry.lengths), *_making([*made, *costs.values()])),
        versions=versions(),
        hardware=hardware(costs[inquiry.lengths[0]].config.device),
        seconds=sum(record.seconds for record in (*made, *costs.values())),
        command=command,
    )


def _rows(inquiry: Inquiry, sheets: Sheets, costs: Costs, length: int) -> Iterator[EvaluationRow]:
    labels = [DENSE, *(named.label for named in inquiry.plans)]
    plans = [None, *(named.plan for named in inquiry.plans)]
    dense = costs.costs[0].cache_bytes
    for index, (label, plan) in enumerate(zip(labels, plans, strict=True)):
        cost: Cost = costs.costs[index]
        scores = {task: sheets[length, task][index].score for task in inquiry.tasks}
        budget = cost.cache_bytes / dense if dense else 1.0
        yield EvaluationRow(
            label=label,
            length=length,
            plan=None if plan is None else plan.model_dump(mode="json", exclude_defaults=True),
            scores=scores,
            at_chance=tuple(task for task, score in scores.items() if score.at_chance),
            budget=budget,
            compression_ratio=1 - budget,
            **dict(cost),
        )


def _told(sheet: Sheet) -> dict[str, object]:
    """A task's options, without the length, which differs."""
    return {name: value for name, value in sheet.config.task.items() if name != "length"}


def _notes(rows: Sequence[EvaluationRow], lengths: Sequence[int]) -> Iterator[str]:
    """What a reader must know before comparing."""
    for length in lengths:
        dense, *others = [row for row in rows if row.length == length]
        for task in dense.at_chance:
            yield (
                f"at {length} tokens the untouched model is at chance at {task}: "
                "this task says nothing about the plans"
            )
        sizes = [row.cache_bytes for row in others]
        if max(sizes) > SAME_BYTES * min(sizes):
            spread = ", ".join(f"{row.label} {percent(row.budget)}" for row in others)
            yield f"at {length} tokens the plans do not hold the same bytes: {spread} of dense"


def _making(records: Sequence[Sheet | Costs]) -> Iterator[str]:
    """What a reader must know of how these results were made."""
    for name in ("versions", "hardware"):
        if any(getattr(record, name) != getattr(records[0], name) for record in records):
            yield f"parts of this result were made with other {name}; each file says which"
    for record in records:
        cores = record.hardware.cores
        if isinstance(record, Costs) and record.load is not None and record.load > BUSY * cores:
            wanted = f"{record.load:.1f} processes wanted its {cores} cores"
            yield f"the machine was busy, at {record.config.length} tokens: {wanted}"
