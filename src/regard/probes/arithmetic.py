r"""Arithmetic heads: heads without whose direct path the answer's own logit falls.

    effect_h = (logit_p(C) - logit_o(C)) / logit_o(C)        C: the right answer's first token

o is the passage, p the same with the head's output at the last token replaced by that of its
contrast (a prompt whose operator says nothing), along the direct path to the logits. Heads with an
effect below -5 % are key heads; they are checked by giving them the mean of what they give in the
contrasts (`accuracy_without`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.answers import LAST, last_logits, positions, right_answer, right_logit
from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.moment import Site
from regard.core.outputs import Noted, Replaced, stacked
from regard.core.passage import Passage
from regard.core.probe import Finding, ProbeCard
from regard.core.scene import Scene, chosen
from regard.probes.paths import Pair, contrast_of

WHO = "arithmetic"


@dataclass(frozen=True)
class Arithmetic:
    """freeze_mlps: hold the feed-forward parts at the last token too."""

    freeze_mlps: bool = False

    @torch.no_grad()
    def run(self, scene: Scene) -> Iterator[tuple[Passage, Site, Finding]]:
        for passage in scene.passages:
            pair = Pair.of(scene, passage, LAST, self.freeze_mlps)
            start = right_logit(pair.before, passage, WHO).double()
            for site in scene.chain:
                sent = (pair.sent(site, head) for head in range(site.heads))
                found = [right_logit(logits, passage, WHO).double() for logits in sent]
                effect = stacked([(logit - start) / start for logit in found])
                yield passage, site, Finding({"direct_effect": effect})


def key_heads(effects: Tensor, below: float = -0.05) -> list[tuple[int, int]]:
    """(layer, head) whose effect (L,H) is lower, the lowest first."""
    order = effects.nan_to_num(torch.inf).flatten().argsort(stable=True).tolist()
    heads = (divmod(i, effects.shape[1]) for i in order)
    return [head for head in heads if effects[head] < below]


@torch.no_grad()
def accuracy_without(scene: Scene, heads: Sequence[tuple[int, int]]) -> float:
    """Share of the sequences whose answer's first token is the likeliest when these (layer, head)
    give at the last token the mean of what they give there in all contrasts.

    Raises:
        ArgumentError: a head the model does not have.
    """
    known = {(site.layer, h) for site in scene.chain for h in range(site.heads)}
    if not set(heads) <= known:
        raise ArgumentError("heads", "(layer, head) of the model", sorted({*heads} - known))
    means, right = _contrast_means(scene), []
    for passage in scene.passages:
        where = positions(passage, LAST)
        values = {name: x.expand(len(where), -1, -1) for name, x in means.items()}
        steps = {}
        for site in scene.chain:
            mine = sorted({h for layer, h in heads if layer == site.layer})
            if mine:
                steps[site.name] = [chosen(Replaced(values, where), mine)]
        with scene.run(steps):
            logits = last_logits(scene.model(**passage.inputs), passage)
        right.append(logits.argmax(-1) == right_answer(passage, WHO))
    return float(torch.cat(right).double().mean())


def _contrast_means(scene: Scene) -> dict[str, Tensor]:
    """By module, the mean (1,H,E) of what heads give at the last token of contrasts."""
    found: dict[str, list[Tensor]] = {}
    for passage in scene.passages:
        other = contrast_of(passage)
        noted = Noted(positions(other, LAST))
        with scene.treated(noted, *scene.chain):
            scene.model(**other.inputs)
        for name, values in noted.found.items():
            found.setdefault(name, []).append(values)
    return {name: torch.cat(values).mean(0, keepdim=True) for name, values in found.items()}


CARD = ProbeCard(
    name=WHO,
    build=Arithmetic,
    metrics={
        "direct_effect": "relative change of the answer's logit with the contrast's head output",
    },
    papers=(
        Paper(
            "2409.01659",
            "Interpreting and Improving Large Language Models in Arithmetic Calculation",
            2024,
        ),
    ),
    claim=Claim("a few heads hold up the answer of a calculation", "regard atlas"),
)
