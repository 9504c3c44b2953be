"""Losses of a fit that other processes measure: the examples, and the job of a worker."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from regard.bench.evaluation import Inquiry, Named
from regard.bench.examining import exam
from regard.bench.exams import Exam
from regard.bench.fitting import FitConfig
from regard.bench.launching import Launcher, Tell
from regard.bench.lessons import lessons
from regard.bench.subject import Subject
from regard.core.passage import Passage
from regard.plan import Plan
from regard.searchers.answering import mean_loss
from regard.searchers.series import Series, Told


def inquiry_of(config: FitConfig, plans: Iterable[Named] = ()) -> Inquiry:
    """What a fit asks its model, under some plans."""
    return Inquiry(
        plans=tuple(plans) or (Named(label="none", plan=Plan()),), tasks=(config.task,),
        lengths=config.lengths, examples=config.exams, seed=config.seed, tokens=config.tokens,
        seconds=config.seconds, file=config.file, later=config.later,
    )  # fmt: skip


def exams_of(config: FitConfig, subject: Subject) -> list[Exam]:
    """The task at every length."""
    inquiry = inquiry_of(config)
    return [exam(config.task, length, inquiry, subject) for length in config.lengths]


def examples_of(config: FitConfig, subject: Subject) -> list[Passage]:
    """What losses are measured on."""
    return [
        passage
        for one in exams_of(config, subject)
        for passage in lessons(one, config.examples, subject.model.device)
    ]


@dataclass(frozen=True, eq=False)
class Measuring:
    """The job: losses of a series of plans."""

    subject: Subject
    config: FitConfig

    @cached_property
    def examples(self) -> list[Passage]:
        """As those of the process that asks."""
        return examples_of(self.config, self.subject)

    def name(self, series: Series) -> str:
        return series.keys[0]

    def __call__(self, series: Series, tell: Tell) -> dict[str, float]:
        found: dict[str, float] = {}
        series.measure(found, lambda plan: mean_loss(self.subject.model, self.examples, plan))
        return found


@dataclass(frozen=True, eq=False)
class Ahead:
    """Has a launcher measure series of losses before a search looks them up in `known`."""

    job: Measuring
    launcher: Launcher
    known: MutableMapping[str, float]

    def __call__(self, series: Sequence[Series], told: Told | None) -> None:
        missing = [rest for one in series if (rest := one.unknown(self.known)) is not None]
        done = self.launcher.map(self.job, missing, lambda record, value: None)
        for index, (one, losses) in enumerate(done):
            if told is not None:
                told(index / len(missing), one.keys[0])
            self.known.update(losses)
