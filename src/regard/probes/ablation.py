r"""Ablation: what the model loses when one head is switched off.

    o_h <- 0 (zero)        o_h <- mean over tokens of o_h (mean)        A_ij <- 1/n_i (uniform)
    cost = L' - L        KL(p || p')        JSD(p, p')        fall = p(y) - p'(y)

L is the mean loss of a passage, p its predictions, y what does come; primes after the change. The
mean is taken over all real tokens of all passages. n_i keys are visible to query i. A head whose
cost is near zero in one domain and not in another is dormant in the first and active in the second.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

import torch

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.moment import Site
from regard.core.outputs import Averaged, Replaced, stacked
from regard.core.passage import Passage
from regard.core.predictions import Predictions
from regard.core.probe import Finding, ProbeCard
from regard.core.scene import Scene
from regard.core.treatment import Treatment
from regard.treatments.head_silence import HeadSilence
from regard.treatments.uniform_heads import UniformHeads

How = Literal["zero", "mean", "uniform"]
HOWS: tuple[How, ...] = get_args(How)


@dataclass(frozen=True)
class Ablation:
    """how: what a head does instead; one forward per head, passage and way."""

    how: tuple[How, ...] = ("zero",)

    def __post_init__(self) -> None:
        if not self.how or not set(self.how) <= set(HOWS):
            raise ArgumentError("how", f"some of {HOWS}", self.how)

    @torch.no_grad()
    def run(self, scene: Scene) -> Iterator[tuple[Passage, Site, Finding]]:
        ways: dict[How, Treatment] = {how: _treatment(how, scene) for how in self.how}
        for passage in scene.passages:
            before = Predictions.of(scene.model(**passage.inputs), passage)
            for how, treatment in ways.items():
                for site, after in ablated(scene, passage, treatment):
                    yield passage, site, _compared(how, before, after)


def ablated(
    scene: Scene, passage: Passage, treatment: Treatment
) -> Iterator[tuple[Site, Iterator[Predictions]]]:
    """The model's predictions of a passage with a treatment of one head after the other, by site;
    those of a site must be taken before the next site.
    """
    each = scene.each_head(treatment, passage)
    for site, runs in groupby(each, key=lambda run: run[0]):
        yield site, (Predictions.of(output, passage) for _, _, output in runs)


def _treatment(how: How, scene: Scene) -> Treatment:
    if how == "zero":
        return HeadSilence()
    if how == "uniform":
        return UniformHeads()
    averaged = Averaged()
    with scene.treated(averaged):
        for passage in scene.passages:
            scene.model(**passage.inputs)
    return Replaced(averaged.means())


def _compared(how: How, before: Predictions, after: Iterator[Predictions]) -> Finding:
    """The metrics (B,H) of one way, from the predictions without each head."""
    loss, chance = before.losses(), before.chances()
    rows = [(p.losses() - loss, before.kl(p), before.jsd(p), chance - p.chances()) for p in after]
    names = (f"{name}_of_{how}" for name in ("cost", "kl", "jsd", "fall"))
    columns = (stacked(list(column)) for column in zip(*rows, strict=True))
    return Finding(dict(zip(names, columns, strict=True)))


WAYS: dict[How, str] = {
    "zero": "gives nothing",
    "mean": "gives its mean output",
    "uniform": "attends to all keys alike",
}

CARD = ProbeCard(
    name="ablation",
    build=Ablation,
    metrics={
        name: meaning
        for how, what in WAYS.items()
        for name, meaning in (
            (f"cost_of_{how}", f"rise of the loss when the head {what}, in nats"),
            (f"kl_of_{how}", f"KL divergence of the predictions when the head {what}, in nats"),
            (f"jsd_of_{how}", f"Jensen-Shannon divergence when the head {what}, 0 to ln 2"),
            (f"fall_of_{how}", f"fall of the true token's or class's chance when the head {what}"),
        )
    },
    papers=(
        Paper(
            "2303.13731",
            "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt",
            2023,
        ),
        Paper(
            "2410.13835",
            "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena "
            "in LLMs",
            2024,
        ),
    ),
    claim=Claim("most heads can be switched off alone at little cost", "regard atlas"),
)
