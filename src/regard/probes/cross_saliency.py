r"""Cross-attention against saliency: whether a head of a decoder looks at what it predicts from
in the encoder's sequence.

    r_h = Pearson's r of A_h and S        A_h: weights (I,T'), S: saliency (I,T'), row by row alike

S says how far each of I predictions moves, in nats, when parts of the input are hidden at random
(lenses/occlusion.py): stretches of a spectrogram, tokens of a text, or what the encoder gives,
which leaves out what it mixes. Every sequence is taken by itself, without padding. Beside heads, r
of the mean of a layer's heads, and of all heads up to a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.moment import Moment, Site
from regard.core.passage import Passage
from regard.core.probe import Finding, ProbeCard
from regard.core.scene import Scene
from regard.core.shown import observed
from regard.core.treatment import Treatment
from regard.lenses.agreement import pearson
from regard.lenses.forced_decoding import Spoken, said_of
from regard.lenses.occlusion import frames_of, occlusion, segment_masks

WHO = "cross_saliency"
COARSER = (1, 2, 4)
"""How many of the finest segments make one, by granularity."""


@dataclass(frozen=True)
class CrossSaliency:
    """hide: parts of the input, or of what the encoder gives. masks: forwards per sequence. steps,
    bands: the finest segments along time and frequency, at most. pool: how a spectrogram's heat is
    brought to the encoder's frames. seed: of the masks.
    """

    hide: Literal["input", "encoded"] = "input"
    masks: int = 256
    steps: int = 64
    bands: int = 8
    pool: Literal["mean", "max"] = "max"
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.masks, self.steps, self.bands) < 1:
            raise ArgumentError("CrossSaliency", "masks, steps and bands from 1 on", self)
        if self.hide not in ("input", "encoded") or self.pool not in ("mean", "max"):
            raise ArgumentError("hide, pool", "'input' or 'encoded'; 'mean' or 'max'", self)

    @torch.no_grad()
    def run(self, scene: Scene) -> Iterator[tuple[Passage, Site, Finding]]:
        crosses = [site for site in scene.sites if site.cross]
        if not crosses:
            raise UnsupportedError(WHO, "the model has no cross-attention")
        for passage in scene.passages:
            for row in range(len(said_of(passage))):
                spoken = Spoken.of(passage, row, scene.model.config)
                maps = Maps()
                with scene.treated(maps, *crosses):
                    scene.model(**spoken.inputs)
                reached = [site for site in crosses if site.name in maps.found]
                heat = self.saliency(scene.model, spoken, maps.found[reached[0].name].shape[-1])
                for site, finding in compared(maps, reached, heat):
                    yield passage, site, finding

    def saliency(self, model: Any, spoken: Spoken, frames: int) -> Tensor:
        """Saliency (I,frames) of the encoder's frames for each prediction."""
        if self.hide == "encoded":
            x, predict, fill = spoken.encoded(model), spoken.answer(model), 0.0
            shape = x.shape[:1]
        else:
            x, predict, fill = spoken.source, spoken.predict(model), spoken.fill
            shape = x.shape
        finest = [min(n, most) for n, most in zip(shape, (self.steps, self.bands), strict=False)]
        cells = [tuple(max(1, n // by) for n in finest) for by in COARSER]
        masks = segment_masks(tuple(shape), cells, self.masks, seed=self.seed)
        heat = occlusion(predict, x, masks, fill=fill)
        return heat if heat.shape[1:] == (frames,) else frames_of(heat, frames, self.pool)


@dataclass(frozen=True, eq=False)
class Maps(Treatment):
    """Changes nothing; keeps the weights (H,N,M) of every module, of one sequence."""

    found: dict[str, Tensor] = field(default_factory=dict)

    def output(self, output: Tensor, at: Moment) -> Tensor:
        shape = (*at.q.shape[:3], at.k.shape[2])
        whole = torch.zeros(shape, device=at.q.device, dtype=torch.float64)
        for seen in observed(at):
            whole[seen.batch, seen.heads, seen.rows][..., seen.keys] = seen.weights.double()
        self.found[at.site.name] = whole[0]
        return output


def compared(maps: Maps, sites: Sequence[Site], heat: Tensor) -> Iterator[tuple[Site, Finding]]:
    """Agreement of the maps of successive layers, and of their means, with saliency (I,T')."""
    wanted = heat.double()
    total, heads = torch.zeros_like(wanted), 0
    for site in sites:
        own = maps.found[site.name]
        total, heads = total + own.sum(0), heads + len(own)
        means = {"cross_saliency_layer": own.mean(0), "cross_saliency_up_to": total / heads}
        layers = {name: pearson(mean, wanted)[None] for name, mean in means.items()}
        yield site, Finding({"cross_saliency": pearson(own, wanted)[None]}, layers=layers)


CARD = ProbeCard(
    name="cross_saliency",
    build=CrossSaliency,
    metrics={"cross_saliency": "Pearson's r of the head's weights and saliency, -1 to 1"},
    layers={
        "cross_saliency_layer": "the same of the mean of the layer's heads",
        "cross_saliency_up_to": "the same of the mean of all heads up to the layer",
    },
    papers=(
        Paper("2509.18010", "Cross-Attention is Half Explanation in Speech-to-Text Models", 2025),
    ),
    claim=Claim(
        "heads agree with saliency in part, their mean more than most alone",
        "regard atlas path/to/whisper --probes cross_saliency",
    ),
)
