r"""AMP's importance: how much a head adds to the stream, by the size of its projected output.

    I_h = 1/N sum_n |o_nh W_h|_1        o_nh (E,), W_h (E,C) its rows of the output projection

The mean is over real tokens; the projection's bias belongs to no head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.answers import real_or_all
from regard.core.card import Claim, Golden, Paper
from regard.core.moment import Site
from regard.core.outputs import stacked
from regard.core.passage import Passage
from regard.core.passing import by_head, passing
from regard.core.probe import Finding, ProbeCard
from regard.core.scene import Scene


@dataclass(frozen=True)
class Amp:
    """No options; one forward per passage."""

    @torch.no_grad()
    def run(self, scene: Scene) -> Iterator[tuple[Passage, Site, Finding]]:
        modules = {s.name: scene.host.projection(scene.model, s) for s in scene.own}
        for passage in scene.passages:
            with passing(modules) as passed:
                scene.model(**passage.inputs)
            for site in scene.own:
                given = passed[site.name][0]
                given = given.view(-1, *given.shape[-2:])  # some towers have no batch axis
                real = real_or_all(passage, given)
                size = contribution(given, by_head(modules[site.name], given, site.heads), real)
                yield passage, site, Finding({"contribution": size})


def contribution(heads: Tensor, slices: Tensor, real: Tensor) -> Tensor:
    """Mean L1 norm (B,H), over real tokens (B,N), of what each head adds: heads (B,N,H*E), slices
    (H,E,C) of the output projection.
    """
    found = []
    for one, matrix in zip(heads.unflatten(-1, slices.shape[:2]).unbind(-2), slices, strict=True):
        size = (one @ matrix).abs().sum(-1, dtype=torch.float64)
        found.append(size.masked_fill(~real, 0.0).sum(-1) / real.sum(-1))
    return stacked(found)


def replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' importance, the mean over all sequences."""
    x, weight = case["inputs"]["x"], case["state_dict"]["o_proj.weight"]
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.load_state_dict({"weight": weight})
    with torch.no_grad():
        slices = by_head(module, x, case["config"]["num_heads"])
        sizes = contribution(x, slices, torch.ones(x.shape[:2], dtype=torch.bool))
    return {"head_importance": sizes.mean(0).to(x.dtype)}


CARD = ProbeCard(
    name="amp",
    build=Amp,
    metrics={"contribution": "mean L1 norm of what the head adds to the stream"},
    papers=(
        Paper(
            "2504.21174",
            "Efficient LLMs with AMP: Attention Heads and MLP Pruning",
            2025,
        ),
    ),
    claim=Claim("heads that add little can go", "regard atlas"),
    goldens=(
        Golden(
            "145_amp_heads.pt",
            replay,
            "https://github.com/c2d-usp/Efficient-LLMs-with-AMP",
            "38d9312819",
        ),
    ),
)
