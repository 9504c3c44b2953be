"""`fit`: from a budget to a plan, and the proof: the plan beside others of the same cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from regard.bench.assigning import assigned
from regard.bench.evaluate import evaluate, unwatched
from regard.bench.evaluation import Evaluation, Named
from regard.bench.fitting import Fit, FitConfig, Ledger, RisesConfig
from regard.bench.launching import Here, Launcher
from regard.bench.losses import Ahead, Measuring, examples_of, exams_of, inquiry_of
from regard.bench.record import write_json
from regard.bench.subject import Subject
from regard.bench.sweep import Progress, Watch
from regard.core.errors import ArgumentError
from regard.plan import Plan
from regard.searchers.fitting import Fitted, Sensitivity, decoder_sites, fitted, sensitivity
from regard.searchers.pacing import paces
from regard.searchers.prices import Prices, prices
from regard.searchers.refining import Company, refined
from regard.searchers.rules import RuleName, groups_of, ladder, plan_of, rule_of


def fit(
    config: FitConfig,
    subject: Subject,
    out: Path,
    *,
    command: str = "",
    watch: Watch = unwatched,
    launcher: Launcher | None = None,
) -> Fit:
    """Measure what every rule costs every key head, choose, and evaluate the choice.

    Losses are kept in OUT/losses as they are measured, exams in OUT/sheets and OUT/costs; the same
    call resumes. Writes OUT/plan.json and OUT/fit.json. launcher: where losses and exams are
    measured, in this process if None; the same numbers come out of all.

    Raises:
        ArgumentError: a budget that cannot be met, with the smallest that can; a task the untouched
            model cannot do; a value or folder that cannot be used.
        UnsupportedError: a model without a cache.
        LostError: losses or exams whose workers were killed; all others are kept.
    """
    began = time.perf_counter()
    search = _Search(config, subject, out, watch, launcher)
    search.check_able()
    found, best = search.found(), search.best()
    best.plan.save(out / "plan.json")
    evaluation = search.evaluation(command)
    fit = Fit(
        config=config,
        plan=best.plan.model_dump(mode="json", exclude_defaults=True),
        groups=tuple(assigned(found, best, search.examples, subject)),
        untouched=found.untouched,
        predicted=best.predicted,
        measured=best.measured,
        cost=best.cost,
        evaluation=evaluation,
        notes=tuple(_notes(config, evaluation)),
        seconds=time.perf_counter() - began,
    )
    write_json(out / "fit.json", fit)
    return fit


class _Search:
    """A fit under way."""

    def __init__(
        self,
        config: FitConfig,
        subject: Subject,
        out: Path,
        watch: Watch,
        launcher: Launcher | None,
    ) -> None:
        self.config, self.subject, self.out, self.watch = config, subject, out, watch
        self.launcher = launcher
        self.rules = ladder(config.rule, config.shares, config.sinks)
        self.exams = exams_of(config, subject)
        self.examples = examples_of(config, subject)
        self.known = Ledger(
            out / "losses",
            RisesConfig(
                model=subject.record().fingerprint,
                tasks=tuple(one.describe() for one in self.exams),
                examples=config.examples,
                seed=config.seed,
            ),
        )
        self.ahead = None
        if launcher is not None and not isinstance(launcher, Here):
            self.ahead = Ahead(Measuring(subject, config), launcher, self.known)
        self._fitted: dict[float, Fitted] = {}
        self._found: Sensitivity | None = None
        self._prices: Prices | None = None
        self.prices().room(config.budget)  # refuses early what cannot be met

    def check_able(self) -> None:
        """Raise ArgumentError unless the untouched model is better than chance at the task."""
        for one, length in zip(self.exams, self.config.lengths, strict=True):
            self.watch(Progress(0, 1, f"{self.config.task} at {length}, untouched"))
            score = one.score(self.subject.model, None)
            if score.at_chance:
                got = f"{self.config.task} at {length} tokens: {score.value} (chance {one.chance})"
                raise ArgumentError("task", "one the untouched model can do", got)

    def found(self) -> Sensitivity:
        """The rises, measured or remembered."""
        if self._found is None:
            self._found = sensitivity(
                self.subject.model,
                self.examples,
                self.rules,
                known=self.known,
                ahead=self.ahead,
                progress=self._tell,
            )
        return self._found

    def prices(self) -> Prices:
        """What the rules cost in the budget's unit."""
        if self._prices is None:
            model, sites = self.subject.model, decoder_sites(self.subject.model)
            groups = groups_of(sites)
            self._prices = prices(
                model, sites, groups, self.rules, self.config.lengths, self.config.unit,
                paces(model, groups, self.examples),
            )  # fmt: skip
        return self._prices

    def fitted(self) -> dict[float, Fitted]:
        """The plans for half the budget, the budget and twice it, as far as rules reach. A larger
        budget also tries the plan of a smaller one, so that it is never measured to be worse.
        """
        if not self._fitted:
            company = Company(
                self.subject.model, self.examples, self.found(), self.known, self.ahead
            )
            for budget in self._budgets():
                start = fitted(self.subject.model, self.found(), self.prices(), budget)
                also = [smaller.choice for smaller in self._fitted.values()]
                self._fitted[budget] = refined(
                    company, start, self.prices(), budget, rounds=self.config.rounds, also=also,
                    progress=self._tell,
                )  # fmt: skip
        return self._fitted

    def _budgets(self) -> Iterator[float]:
        for budget in (self.config.budget / 2, self.config.budget, self.config.budget * 2):
            if budget < 1 and self.prices().reaches(budget):
                yield budget

    def best(self) -> Fitted:
        """The plan for the budget that was asked for."""
        return self.fitted()[self.config.budget]

    def evaluation(self, command: str) -> Evaluation:
        """The plans side by side."""
        inquiry = inquiry_of(self.config, self.plans())
        return evaluate(
            inquiry, self.subject, self.out, command=command, watch=self.watch,
            launcher=self.launcher,
        )  # fmt: skip

    def plans(self) -> Iterator[Named]:
        """The fitted plan, others of the same cost, and a step down and up the frontier."""
        own = self.config.budget
        yield Named(label=f"fitted {own:.3g}", plan=self.best().plan)
        yield from self._others(own)
        for budget, found in self.fitted().items():
            if budget != own:
                yield Named(label=f"fitted {budget:.3g}", plan=found.plan)
                yield self._uniform("uniform", budget, self.config.rule)

    def _others(self, budget: float) -> Iterator[Named]:
        own = self.config.rule
        yield self._uniform("uniform", budget, own)
        yield self._uniform("recent only", budget, "spans", sinks=0)
        order = np.random.default_rng(self.config.seed).permutation(len(self.found().groups))
        mixed = self.best().choice[order]
        plan = plan_of(self.found().groups, self.rules, mixed, name="")
        yield Named(label=f"random {budget:.3g}", plan=plan)
        if own == "spans":
            yield self._uniform("snapkv", budget, "snapkv")
        else:
            yield self._uniform("sinks and recent", budget, "spans")

    def _uniform(
        self, label: str, budget: float, name: RuleName, sinks: int | None = None
    ) -> Named:
        """One rule for every head, at the cost of a budget."""
        sinks = self.config.sinks if sinks is None else sinks
        rule = rule_of(name, self._share(budget), sinks)
        steps = () if rule.treatment is None else (rule.step("all"),)
        return Named(label=f"{label} {budget:.3g}", plan=Plan(steps=steps))

    def _share(self, budget: float) -> float:
        """The share of the tokens that all heads alike may keep within a budget."""
        whole = self.prices().costs.max(2).sum(1)
        return float((self.prices().room(budget) / whole).min())

    def _tell(self, share: float, what: str) -> None:
        self.watch(Progress(round(100 * share), 100, what))


def _notes(config: FitConfig, evaluation: Evaluation) -> Iterator[str]:
    """What a reader must know before believing."""
    yield (
        f"losses are measured on {config.examples} examples per length; rises of single heads are "
        "taken as additive to begin with; the evaluation asks other questions"
    )
    if config.unit == "latency":
        yield "latency was measured on this machine; another run may choose otherwise"
    yield from evaluation.notes
