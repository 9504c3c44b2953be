r"""Sharing by likeness: a layer loses least by another's attention map where the two attend alike.

    s_h(a, b) = mean over sequences of cos(A^a_h, A^b_h)        layer b uses A^a_h, a < b

The neighbours that are most alike share one map, beside every other two neighbours; and layer b
copies each head's map of every earlier layer in turn, so that copies of one layer are compared with
one another: how much it does for the loss counts as well, and likeness does not tell that.

Differs from the paper: nothing is trained, and a pocket model has four layers, little alike (at
most a cosine of 0.4). Likeness finds the neighbours that lose least, but does not order the others:
the first two are more alike than the middle ones and lose most, a reason to leave first layers on
their own, as the paper does. The loss is that of text; answers to needles survive any sharing but
that of the first two layers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.core.card import Claim
from regard.core.errors import ArgumentError
from regard.core.passage import Passage
from regard.core.scene import Scene
from regard.core.study import Curve, Figure, Outcome, Progress, StudyCard
from regard.importance.map_similarity import head_similarity
from regard.plan import Plan, Step
from regard.probes.map_similarity import maps_of
from regard.searchers.map_sharing import CARD as SEARCHER
from regard.searchers.map_sharing import map_sharing
from regard.studies.searching.needles import pocket, scores
from regard.studies.searching.texts import texts

Copy = tuple[tuple[int, int], int | None]
"""The layer whose map is used and the one that uses it, and the head; None: all heads."""


@dataclass(frozen=True)
class SharingByLikeness:
    """length: bytes of a text; texts: how many are compared on, and how many are read; rows:
    queries of each whose weights are compared.
    """

    length: int = 256
    texts: int = 32
    rows: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ArgumentError("rows", "at least 1", self.rows)

    def run(self, progress: Progress) -> Outcome:
        """Share the map of the most alike, of all neighbours, and each head's with later layers."""
        model = pocket()
        shown = texts(self.length, self.texts, "valid", self.seed)
        exam = texts(self.length, self.texts, "test", self.seed)
        likeness = self.likeness(model, shown)
        most = float(likeness.mean(2).diagonal(1).max()) - 1e-6
        own = map_sharing(model, shown, most, skip_first=0, skip_last=0, rows=self.rows)
        layers, _, heads = likeness.shape
        copies: list[Copy] = [((a, a + 1), None) for a in range(layers - 1)]
        copies += itertools.product(itertools.combinations(range(layers), 2), range(heads))
        plans = [Plan(), own.plan, *(_sharing(*copy) for copy in copies)]
        losses = []
        for index, plan in enumerate(plans):
            losses.append(-scores(model, exam, [plan], "loss")[0])
            progress((index + 1) / len(plans))
        cosines = [float(likeness[pair][head].mean()) for pair, head in copies]
        rises = [loss - losses[0] for loss in losses[1:]]
        points = dict(zip(copies, zip(cosines, rises[1:], strict=True), strict=True))
        others = [points[copy][1] for copy in copies[: layers - 1] if copy[0] not in own.blocks]
        return self.outcome(rises[0] / float(np.mean(others)), points)

    def likeness(self, model: Any, given: list[Passage]) -> Tensor:
        """Mean cosines (L,L,H) of the layers' maps."""
        scene, found = Scene.of(model, given), []
        for text in scene.passages:
            maps = maps_of(scene, text, self.rows)
            found.append(torch.stack([torch.stack([_alike(a, b) for b in maps]) for a in maps]))
        return torch.stack(found).mean(0)

    def outcome(self, ratio: float, points: dict[Copy, tuple[float, float]]) -> Outcome:
        """Of the rise under the plan found, as a part of other neighbours', and of the cosine and
        the rise of every copy.
        """
        single = {
            (pair[1], head, pair[0]): xy for (pair, head), xy in points.items() if head is not None
        }
        told = [
            (single[one][0] - single[other][0]) * (single[other][1] - single[one][1]) > 0
            for one, other in itertools.combinations(single, 2)
            if one[:2] == other[:2]  # the same head of the same layer copies
        ]
        less, best = "less than others", "the more alike, the less is lost"
        figures = (
            Figure("rise, most alike, of other neighbours' mean", ratio, less, high=0.5),
            Figure("share of maps to copy told apart", float(np.mean(told)), best, low=0.7),
        )
        lines = {
            f"layer {layer}, a head": sorted(xy for key, xy in single.items() if key[0] == layer)
            for layer in sorted({key[0] for key in single})
        }
        whole = sorted(xy for (_, head), xy in points.items() if head is None)
        lines["neighbours, all heads"] = whole
        return Outcome(figures, (Curve("Rise of the loss of text", "cosine", "nats", lines),))


def _alike(maps: Tensor, others: Tensor) -> Tensor:
    """Mean cosine (H,) of two layers' maps (B,H,r,M)."""
    return head_similarity(maps, others).mean(0)


def _sharing(pair: tuple[int, int], head: int | None = None) -> Plan:
    """The plan in which the second of two layers uses the first's map, of one head or of all."""
    heads = None if head is None else (head,)
    return Plan(steps=(Step(treatment="shared_maps", layers=pair, heads=heads),))


CARD = StudyCard(
    name="sharing_by_likeness",
    build=SharingByLikeness,
    papers=SEARCHER.papers,
    claim=Claim(
        "layers chosen for their like maps share one at less loss than others do",
        "regard study sharing_by_likeness",
    ),
    seconds=10,
    small={"length": 48, "texts": 2},
)
