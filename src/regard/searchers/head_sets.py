"""Sets of heads under one treatment, on any host: put in force for a while, and told as a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, fields
from typing import Any

from regard.core.catalog import treatments
from regard.core.errors import UnsupportedError
from regard.core.mode import in_mode
from regard.core.moment import Site
from regard.core.scene import Scene, chosen
from regard.core.treatment import Treatment, places_of
from regard.plan import Plan, Step
from regard.plan.choice import check_groups
from regard.plan.resolved import signature
from regard.searchers.judging import By, judged

Head = tuple[Site, int]
"""A query head of an attention module."""
Heads = tuple[Head, ...]
Treated = Callable[[], AbstractContextManager[Any]]
"""Opens a context in which the heads in question are treated."""
Objective = Callable[[Treated], float]
"""What is to be large; it runs the model inside the context, and outside of it if it compares."""
SAME = 1e-6
"""Objectives that differ by less are equal: rounding tells nothing of a head, and a treatment that
changes nothing may still lead through another kernel.
"""


def every_head(sites: Sequence[Site]) -> Heads:
    """All heads of some modules, in the model's order."""
    return tuple((site, head) for site in sites for head in range(site.heads))


def units(sites: Sequence[Site], treatment: Treatment) -> tuple[Heads, ...]:
    """Heads that can only be treated together: each by itself, or, where the treatment evicts keys,
    those that share them.
    """
    evicts = "keep" in places_of(type(treatment))
    found: dict[tuple[Site, int], list[Head]] = {}
    for site, head in every_head(sites):
        found.setdefault((site, head // site.group if evicts else head), []).append((site, head))
    return tuple(map(tuple, found.values()))


def treating(scene: Scene, treatment: Treatment, heads: Iterable[Head]) -> Treated:
    """Opens a context in which these heads are treated, in every phase the treatment serves, after
    the steps of the scene's plan.

    Raises:
        ArgumentError: heads that the treatment cannot serve, or half of those that share keys.
    """
    by_site: dict[Site, set[int]] = {}
    for site, head in heads:
        by_site.setdefault(site, set()).add(head)
    steps = {
        site.name: [chosen(treatment, sorted(mine), phases=treatment.serves)]
        for site, mine in by_site.items()
    }
    for site, mine in by_site.items():
        treatment.check(site, tuple(sorted(mine)))
        check_groups(steps[site.name][0], site)
    return lambda: scene.run(steps) if steps else scene.planned()


def judging(scene: Scene, by: By) -> Objective:
    """The objective of predicting the scene's passages well, without dropout."""

    def objective(treated: Treated) -> float:
        with in_mode(scene.model, False), treated():
            return judged(scene.model, scene.passages, by)

    return objective


def plan_of_heads(scene: Scene, treatment: Treatment, heads: Iterable[Head], name: str) -> Plan:
    """The plan in which these heads are treated, without the scene's own; layers of one tower that
    name the same heads share a step.

    Raises:
        UnsupportedError: a treatment that is not of the library, which no plan can name.
    """
    kind, options = _told(treatment)
    by_site: dict[Site, list[int]] = {}
    for site, head in heads:
        by_site.setdefault(site, []).append(head)
    shared: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for site, mine in sorted(by_site.items(), key=lambda item: (item[0].tower, item[0].layer)):
        shared.setdefault((site.tower, tuple(sorted(mine))), []).append(site.layer)
    steps = tuple(
        Step(
            treatment=kind,
            options=options,
            layers=tuple(layers),
            heads=mine,
            modules=tower,
            phases=tuple(sorted(treatment.serves, reverse=True)),
        )
        for (tower, mine), layers in shared.items()
    )
    return Plan(name=name, made_for=signature(scene.model), steps=steps)


def _told(treatment: Treatment) -> tuple[str, dict[str, Any]]:
    """A treatment's name in plans, and its options where they are not the defaults."""
    for name, card in treatments().items():
        if card.build is type(treatment):
            values = {f.name: (getattr(treatment, f.name), f.default) for f in fields(card.build)}  # type: ignore[arg-type]
            return name, {
                key: value
                for key, (value, default) in values.items()
                if default is MISSING or value != default
            }
    raise UnsupportedError("plan", f"{type(treatment).__name__} is no treatment of the library")
