"""The scene of an experiment: a model, the passages it is shown, and treatments of its heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from regard.core.errors import UnsupportedError
from regard.core.hosting import Host, host_of
from regard.core.incoming import Chosen
from regard.core.moment import Site
from regard.core.passage import Passage
from regard.core.treatment import Treatment

PREFILL = frozenset(("prefill",))
Steps = Mapping[str, Sequence[Chosen]]


def chosen(
    treatment: Treatment, heads: Sequence[int], index: int = 0, phases: Any = PREFILL
) -> Chosen:
    """A step by itself: a treatment on some heads."""
    return Chosen(index, treatment, tuple(heads), frozenset(phases))


@dataclass(frozen=True, eq=False)
class Scene:
    """A model under study. sites: the attention modules that are measured; passages: at least
    one.
    """

    model: Any
    host: Host
    sites: tuple[Site, ...]
    passages: tuple[Passage, ...]

    @classmethod
    def of(cls, model: Any, passages: Sequence[Passage]) -> Scene:
        """The scene of every attention module that a host reaches.

        Raises:
            UnsupportedError: none is reached.
        """
        host = host_of(model)
        sites = tuple(host.sites(model))
        if not sites:
            why = next(iter(host.unreached(model).values()), "it has no attention module")
            raise UnsupportedError("atlas", f"{type(model).__name__}: {why}")
        return cls(model, host, sites, tuple(passages))

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
        with self.host.run(self.model, steps) as run:
            yield run

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
