"""Exams as records: which plan sits which task at which length, and the job of examining it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from regard.bench.evaluation import DENSE, Inquiry, Sheet, SheetConfig, Task
from regard.bench.exams import Exam
from regard.bench.launching import Tell
from regard.bench.machine import hardware, versions
from regard.bench.store import keep
from regard.bench.subject import Subject
from regard.bench.symbol_exams import SymbolFacts
from regard.bench.text_exams import Passages, TextFacts
from regard.tasks.needle import Needle

QUESTIONS = 8
"""A passage has many tokens to score, a question few: so many questions to a passage."""
FACTS = 16
"""Facts of recall in symbols, all asked."""
NAMED_FACTS = 4
"""The same, in text."""


def exam(task: Task, length: int, inquiry: Inquiry, subject: Subject) -> Exam:
    """A task for this model at one length."""
    examples, file, later = inquiry.examples, inquiry.file, inquiry.later
    if task == "perplexity":
        return Passages(subject, length, max(1, examples // QUESTIONS), file)
    if not subject.symbols:
        facts = 1 if task == "needle" else NAMED_FACTS
        return TextFacts(subject, length, facts, examples, inquiry.seed, file, later)
    if task == "needle":
        return SymbolFacts(Needle(length, file=file, examples=examples), inquiry.seed, later)
    needle = Needle(length, facts=FACTS, asked=FACTS, file=file, examples=examples)
    return SymbolFacts(needle, inquiry.seed, later)


@dataclass(frozen=True)
class Asked:
    """An exam to be set: what the plan is called ("": the model as it is), task, tokens of the
    prompt, and all that decides the score.
    """

    label: str
    task: Task
    length: int
    config: SheetConfig


@dataclass(frozen=True, eq=False)
class Examining:
    """The job: set one exam, and keep the sheet in a folder."""

    inquiry: Inquiry
    subject: Subject
    folder: Path

    def name(self, asked: Asked) -> str:
        return f"{asked.label or DENSE}, {asked.task} at {asked.length}"

    def __call__(self, asked: Asked, tell: Tell) -> Sheet:
        tell(0.0)
        started = time.perf_counter()
        set_now = exam(asked.task, asked.length, self.inquiry, self.subject)
        sheet = Sheet(
            config=asked.config,
            score=set_now.score(self.subject.model, asked.config.plan),
            versions=versions(),
            hardware=hardware(str(self.subject.model.device)),
            seconds=time.perf_counter() - started,
        )
        keep(self.folder, sheet)
        return sheet
