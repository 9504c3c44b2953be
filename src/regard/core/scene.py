"""The scene of an experiment: a model, the passages it is shown, and treatments of its heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


def logits_of(output: Any) -> Tensor:
    """The scores a forward gives: of tokens (B,N,V) or of classes (B,V).

    Raises:
        UnsupportedError: it gives none.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise UnsupportedError("experiment", "the model gives no logits")
    return found


def losses(logits: Tensor, passage: Passage) -> Tensor:
    """Mean negative log-likelihood (B,) of each sequence, in nats: of its next tokens, logits
    (B,N,V), or of its label, logits (B,V).

    Raises:
        UnsupportedError: neither tokens to predict nor labels.
    """
    if passage.labels is not None and logits.ndim == 2:
        return F.cross_entropy(logits.float(), passage.labels, reduction="none")
    tokens = passage.tokens
    if tokens is None or logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise UnsupportedError("experiment", "there are no next tokens or labels to predict")
    real = torch.ones_like(tokens, dtype=torch.bool)
    if passage.padding is not None and passage.padding.shape == real.shape:
        real = passage.padding
    kept = real[:, 1:] & real[:, :-1]
    if passage.scored is not None:
        kept = kept & passage.scored[:, 1:]
    found = F.cross_entropy(logits[:, :-1].float().mT, tokens[:, 1:], reduction="none")
    return found.masked_fill(~kept, 0.0).sum(-1) / kept.sum(-1)
