"""Watching one forward: every attention call is shown to the readings, tile by tile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from regard.atlases.piece import Piece
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.moment import Moment, Site
from regard.core.passage import Passage
from regard.core.passing import STREAM, block_of
from regard.core.probe import Finding, Look, Reading, Tally, look_at
from regard.core.scene import Scene
from regard.core.shown import observed, unseen
from regard.core.treatment import Treatment


@dataclass(frozen=True, eq=False)
class Watch(Treatment):
    """Shows every call of a forward of one passage, by its index, to the readings; changes nothing.
    piece: takes what they find.
    """

    readings: Mapping[str, Reading]
    piece: Piece
    scene: Scene
    index: int
    streams: dict[str, Tensor] = field(default_factory=dict)

    @property
    def watches(self) -> bool:
        return True

    def output(self, output: Tensor, at: Moment) -> Tensor:
        passage = self.scene.passages[self.index]
        look = self.look(at, output, passage)
        tallies: list[Tally] = [*self.tallies(look, at.site)]
        if self.piece.strongest.count and not at.site.cross:
            tallies.append(self.piece.strongest.begin(look, at.site, self.index, passage))
        if tallies:
            for seen in observed(at):
                for tally in tallies:
                    tally.add(seen)
        domain = self.scene.domain(passage)
        for tally in tallies:
            self.piece.gathered.add(at.site, self.known(tally.found(), at), domain)
        return output

    def known(self, finding: Finding, at: Moment) -> Finding:
        """A finding without the heads that a plan computes another way."""
        gone = list(unseen(at))
        if not gone:
            return finding
        where = f"layer {at.site.layer} of {at.site.tower}, heads {gone}"
        why = "the plan computes their attention another way: there are no weights"
        self.piece.notes[where] = why
        parts = ({n: x.clone() for n, x in p.items()} for p in (finding.metrics, finding.profiles))
        metrics, profiles = parts
        for x in (*metrics.values(), *profiles.values()):
            x[:, gone] = float("nan")
        return Finding(metrics, profiles, finding.layers)

    def tallies(self, look: Look, site: Site) -> Iterator[Tally]:
        """A tally of every reading that can serve this call."""
        for name, reading in self.readings.items():
            try:
                yield reading.begin(look)
            except (UnsupportedError, ArgumentError) as error:
                self.piece.notes.setdefault(f"{name} at {site.tower}", str(error))

    def look(self, at: Moment, output: Tensor, passage: Passage) -> Look:
        """The view of a call with what is known about the passage."""
        look, stream = look_at(at), self.streams.pop(at.site.name, None)
        if at.site.cross:
            return replace(look, output=output, stream=stream)
        shape = look.real_keys.shape
        known = passage.tokens is not None and passage.tokens.shape == shape
        grid = passage.grid
        fits = grid is not None and grid[0] * grid[1] + passage.prefix == shape[1]
        return replace(
            look,
            tokens=passage.tokens if known else None,
            roles={name: x for name, x in passage.roles.items() if x.shape == shape},
            grid=grid if fits else None,
            prefix=passage.prefix if fits else 0,
            output=output,
            stream=stream,
        )

    @contextmanager
    def on(self, scene: Scene) -> Iterator[None]:
        """A context in which forwards of the scene's model are watched."""
        handles = [self._stream_of(scene.model, site) for site in scene.sites]
        try:
            with scene.treated(self):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _stream_of(self, model: Any, site: Site) -> Any:
        """Let the block of a site leave here what enters it."""

        def enter(module: Any, args: Any, kwargs: Any) -> None:
            first = args[0] if args else kwargs.get(STREAM)
            if isinstance(first, Tensor) and first.ndim == 3:
                self.streams[site.name] = first
            else:
                self.streams.pop(site.name, None)

        block = model.get_submodule(block_of(site))
        return block.register_forward_pre_hook(enter, with_kwargs=True)


def watch(scene: Scene, readings: Mapping[str, Reading], index: int, piece: Piece) -> None:
    """Add to a piece what the readings find in one passage of a scene."""
    watching = Watch(readings, piece, scene, index)
    with torch.no_grad(), watching.on(scene):
        scene.model(**scene.passages[index].inputs)
