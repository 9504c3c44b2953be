"""Patching between a passage and its contrast: what one head would have given, sent on alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regard.core.answers import last_logits, positions
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.incoming import Chosen
from regard.core.moment import Site
from regard.core.outputs import Noted, Replaced, without
from regard.core.passage import Passage
from regard.core.passing import overwritten, passing
from regard.core.scene import LAST, Scene, chosen
from regard.probes.receivers import Caught, Delivered, Receiver


@dataclass(frozen=True, eq=False)
class Pair:
    """A passage and its contrast, run once each. where (B,N): the tokens that are patched. heads,
    contrast: by module, what its heads give there, (K,H,E). forward: by module, what the
    feed-forward part of its block gives there, (K,C); empty where that is not frozen. before,
    after (B,V): logits of the next token, of the passage and of its contrast.
    """

    scene: Scene
    passage: Passage
    where: Tensor
    heads: dict[str, Tensor]
    contrast: dict[str, Tensor]
    forward: dict[str, Tensor]
    before: Tensor
    after: Tensor

    @classmethod
    def of(cls, scene: Scene, passage: Passage, position: int | None, freeze: bool) -> Pair:
        """Run both. position: of the tokens that are patched, see `positions`.

        Raises:
            UnsupportedError: the passage has no contrast, or no feed-forward part is found.
            ArgumentError: a contrast of another shape.
        """
        other = contrast_of(passage)
        where, there = positions(passage, position), positions(other, position)
        noted, contrast = Noted(where), Noted(there)
        modules = _feed_forward(scene) if freeze else {}
        with passing(modules) as passed, scene.treated(noted, *scene.chain):
            before = last_logits(scene.model(**passage.inputs), passage)
        with scene.treated(contrast, *scene.chain):
            after = last_logits(scene.model(**other.inputs), other)
        forward = {name: passed[name][1][where] for name in modules}
        return cls(scene, passage, where, noted.found, contrast.found, forward, before, after)

    def swapped(self, site: Site, head: int) -> Tensor:
        """Logits (B,V) when a head gives what it gives in the contrast and all follows from it."""
        step = chosen(Replaced(self._sent(site, head), self.where), [head])
        with self.scene.run({site.name: [step]}):
            return last_logits(self.scene.model(**self.passage.inputs), self.passage)

    def sent(self, site: Site, head: int, receivers: Sequence[Receiver] = ()) -> Tensor:
        """Logits (B,V) when only these receivers, or with none the logits themselves, hear what a
        head gives in the contrast; all other heads give what they gave.
        """
        caught, steps = Caught(self.where), {}
        frozen = Replaced({**self.heads, **self._sent(site, head)}, self.where)
        for other in self.scene.chain:
            every = range(other.heads)
            steps[other.name] = [chosen(caught, every), chosen(frozen, every, LAST + 1)]
        with self._frozen_forward(), self.scene.run(steps):
            logits = last_logits(self.scene.model(**self.passage.inputs), self.passage)
        if not receivers:
            return logits
        delivered: dict[str, list[Chosen]] = {}
        for layer in sorted({receiver[0] for receiver in receivers}):
            target = self.scene.chain[layer]
            mine = {(h, c): caught.found[target.name, c] for i, h, c in receivers if i == layer}
            step = chosen(Delivered(mine, self.where), range(target.heads))
            delivered[target.name] = [step]
        with self.scene.run(delivered):
            return last_logits(self.scene.model(**self.passage.inputs), self.passage)

    def _sent(self, site: Site, head: int) -> dict[str, Tensor]:
        return {site.name: without(self.heads[site.name], self.contrast[site.name], head)}

    @contextmanager
    def _frozen_forward(self) -> Iterator[None]:
        modules = _feed_forward(self.scene) if self.forward else {}
        with overwritten(modules, self.forward, self.where):
            yield


def contrast_of(passage: Passage) -> Passage:
    """The contrast of a passage as a passage.

    Raises:
        UnsupportedError: it has none.
        ArgumentError: it is of another shape.
    """
    if passage.contrast is None or passage.tokens is None:
        raise UnsupportedError("patching", "the passages have no `contrast` or no tokens")
    tokens = passage.contrast.get("input_ids")
    if not isinstance(tokens, Tensor) or tokens.shape != passage.tokens.shape:
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else None
        raise ArgumentError("contrast", f"input_ids {tuple(passage.tokens.shape)}", shape)
    return replace(passage, inputs=passage.contrast, tokens=tokens)


def _feed_forward(scene: Scene) -> dict[str, torch.nn.Module]:
    return {site.name: scene.host.feed_forward(scene.model, site) for site in scene.chain}
