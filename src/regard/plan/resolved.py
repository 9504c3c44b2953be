"""A plan on one model: which steps act on which heads of which attention modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regard.core.errors import UnsupportedError
from regard.core.hosting import Host, host_of
from regard.core.incoming import Chosen
from regard.core.moment import Site
from regard.plan.choice import (
    check_groups,
    check_phases,
    chosen_heads,
    chosen_sites,
    default_sites,
    numbers_of,
)
from regard.plan.step import PlanError, Signature, Step, Storage, said


@dataclass(frozen=True, eq=False)
class Resolved:
    """A plan on one model: which steps act in which layer on which heads. neutral: numbers of steps
    that change nothing and are left out. storage: by attention module, its storage's options.
    """

    steps: tuple[Step, ...]
    host: Host
    sites: tuple[Site, ...]
    table: dict[str, list[Chosen]]
    neutral: tuple[int, ...]
    storage: dict[str, dict[str, Any]]

    def text(self) -> str:
        """A layer x head table: each head shows the numbers of the steps that act on it."""
        lines = [f"{i}: {said(step)}" for i, step in enumerate(self.steps)]
        lines += [f"{i}: neutral, left out" for i in self.neutral]
        if self.storage:
            options = next(iter(self.storage.values()))
            lines.append(f"storage: {options}, {len(self.storage)} layers")
        tower = ""
        for site in self.sites:
            if site.name not in self.table:
                continue
            if site.tower != tower:
                tower = site.tower
                lines += ["", tower, "layer  steps of each head"]
            steps = self.table[site.name]
            cells = [
                "+".join(str(s.index) for s in steps if h in s.heads) or "."
                for h in range(site.heads)
            ]
            lines.append(f"{site.layer:5d}  {' '.join(cells)}")
        return "\n".join(lines)


def signature(model: Any) -> Signature:
    """What identifies the kind of a model: its class and the shape of its main tower."""
    site = default_sites(host_of(model).sites(model))[0]
    return Signature(
        model=type(model).__name__, layers=site.layers, heads=site.heads, kv_heads=site.kv_heads
    )


def resolved(
    model: Any, steps: tuple[Step, ...], made_for: Signature | None, storage: Storage | None
) -> Resolved:
    """See `Plan.resolve`."""
    host = host_of(model)
    sites = host.sites(model)
    if not sites:
        missing = "; ".join(f"{n}: {why}" for n, why in host.unreached(model).items())
        raise UnsupportedError(
            "plan", f"no attention of {type(model).__name__} can be reached ({missing})"
        )
    if made_for is not None and made_for != signature(model):
        raise PlanError("made_for", str(signature(model)), str(made_for))
    table: dict[str, list[Chosen]] = {}
    neutral = []
    for index, step in enumerate(steps):
        treatment = step.build()
        if treatment.neutral:
            neutral.append(index)
        for site in chosen_sites(step, index, sites):
            heads = chosen_heads(step, index, site)
            treatment.check(site, heads)
            chosen = Chosen(index, treatment, heads, frozenset(step.phases))
            check_groups(chosen, site)
            check_phases(chosen, site)
            if not treatment.neutral:
                table.setdefault(site.name, []).append(chosen)
    stored = {} if storage is None else _stored(storage, sites, table)
    return Resolved(steps, host, tuple(sites), table, tuple(neutral), stored)


def _stored(
    storage: Storage, sites: Sequence[Site], table: Mapping[str, Sequence[Chosen]]
) -> dict[str, dict[str, Any]]:
    """The options of quantised storage, by attention module."""
    decoder = [s for s in default_sites(sites) if s.causal]
    if not decoder:
        raise PlanError("storage", "a model with a decoder, which has a cache", "one without")
    layers = numbers_of(storage.layers, decoder[0].layers, "storage.layers")
    options = storage.model_dump(exclude={"layers"}, exclude_none=True)
    found = {s.name: options for s in decoder if s.layer in layers}
    for name in found:
        if any(step.touches("keep") for step in table.get(name, ())):
            raise PlanError("storage.layers", "layers from which no step evicts keys", name)
    return found
