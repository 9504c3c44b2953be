"""The scene of an experiment: a model, the passages it is shown, and treatments of its heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from regard.core.errors import UnsupportedError
from regard.core.hosting import Host, host_of
from regard.core.incoming import Chosen
from regard.core.moment import Site
from regard.core.passage import Passage
from regard.core.treatment import Treatment

PREFILL = frozenset(("prefill",))
Steps = Mapping[str, Sequence[Chosen]]
LAST = 10**6
"""Number of a step that comes after those of any plan."""


def chosen(
    treatment: Treatment, heads: Sequence[int], index: int = LAST, phases: Any = PREFILL
) -> Chosen:
    """A step by itself: a treatment on some heads."""
    return Chosen(index, treatment, tuple(heads), frozenset(phases))


@dataclass(frozen=True, eq=False)
class Scene:
    """A model under study. sites: the attention modules that are measured; passages: at least
    one. plan: steps, by site name, that the model follows all the while.
    """

    model: Any
    host: Host
    sites: tuple[Site, ...]
    passages: tuple[Passage, ...]
    plan: Steps = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, passages: Sequence[Passage], plan: Steps | None = None) -> Scene:
        """The scene of every attention module that a host reaches.

        Raises:
            UnsupportedError: none is reached; a plan is in force already, which what is done here
                would displace.
        """
        host = host_of(model)
        if host.in_force(model):
            raise UnsupportedError("atlas", "a plan is in force; hand it over as `plan` instead")
        sites = tuple(host.sites(model))
        if not sites:
            why = next(iter(host.unreached(model).values()), "it has no attention module")
            raise UnsupportedError("atlas", f"{type(model).__name__}: {why}")
        return cls(model, host, sites, tuple(passages), plan or {})

    @property
    def own(self) -> tuple[Site, ...]:
        """The sites of self-attention."""
        return tuple(site for site in self.sites if not site.cross)

    @property
    def chain(self) -> tuple[Site, ...]:
        """The sites of self-attention of the tower that predicts: the causal one, if there is one,
        else the first.

        Raises:
            UnsupportedError: the model has no self-attention.
        """
        towers = [site.tower for site in self.own if site.causal] or [s.tower for s in self.own]
        if not towers:
            raise UnsupportedError("experiment", "the model has no self-attention")
        return tuple(site for site in self.own if site.tower == towers[0])

    @contextmanager
    def treated(
        self, treatment: Treatment, *sites: Site, heads: Sequence[int] = ()
    ) -> Iterator[Any]:
        """A context in which a treatment acts on these sites (none given: on all), on these heads
        (none: on all), in forwards without a filled cache.
        """
        steps = {
            site.name: [chosen(treatment, heads or range(site.heads))]
            for site in sites or self.sites
        }
        with self.run(steps) as run:
            yield run

    @contextmanager
    def run(self, steps: Steps) -> Iterator[Any]:
        """A context in which steps, by site name, act on the model after those of its plan."""
        every = {name: list(planned) for name, planned in self.plan.items()}
        for name, own in steps.items():
            every.setdefault(name, []).extend(own)
        with self.host.run(self.model, every) as run:
            yield run

    @contextmanager
    def planned(self) -> Iterator[None]:
        """A context in which the model follows its plan, if it has one."""
        if not self.plan:
            yield
            return
        with self.host.run(self.model, self.plan):
            yield

    def each_head(self, treatment: Treatment, passage: Passage) -> Iterator[tuple[Site, int, Any]]:
        """What the model gives of a passage with a treatment of one head after the other."""
        for site in self.sites:
            for head in range(site.heads):
                with self.treated(treatment, site, heads=[head]):
                    output = self.model(**passage.inputs)
                yield site, head, output

    def domain(self, passage: Passage | None) -> str:
        """The kind of data a passage is of; empty for all of them together, and where all are of
        one kind.
        """
        if passage is None or len({p.domain for p in self.passages}) < 2:
            return ""
        return passage.domain
