r"""Logit lens: what a head says by itself, read as if it were the end of the model.

    c_h = z_h W_h  (C,)        l_h = U norm(c_h)        gap_h = l_h[right] - l_h[wrong]

z_h is the head's output at the last token, W_h its rows of the output projection, U the
unembedding, norm the final norm, which sees c_h alone, so that heads' logits do not add up to the
model's. The same is read of feed-forward parts and of their neurons, m_i W_i + b. Where a block has
a norm between its parts and the stream, that norm is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard.core.answers import LAST, answer_gap, positions, right_answer, right_logit
from regard.core.card import Claim, Paper
from regard.core.errors import UnsupportedError
from regard.core.moment import Site
from regard.core.passage import Passage
from regard.core.passing import Passed, by_head, linear, passing
from regard.core.probe import Finding, ProbeCard
from regard.core.scene import Scene

WHO = "logit_lens"
DOWN = ("down_proj", "c_proj", "fc2", "w2", "wo", "dense_4h_to_h")
FINAL = "final norm"


@dataclass(frozen=True)
class LogitLens:
    """No options; one forward per passage. Gaps need passages with a `wrong` answer."""

    @torch.no_grad()
    def run(self, scene: Scene) -> Iterator[tuple[Passage, Site, Finding]]:
        forward, missing = _feed_forward(scene)
        for passage in scene.passages:
            right_answer(passage, WHO)
            read, passed = _run(scene, passage, forward)
            where = positions(passage, LAST)
            for site in scene.chain:
                metrics = _said(read(contributions(scene, site, passed, where)), passage, "head")
                layers = {}
                if site.name in forward:
                    layers = _said(read(passed[f"{site.name}.mlp"][1][where]), passage, "mlp")
                yield passage, site, Finding(metrics, layers=layers)
        if missing is not None:
            raise missing


def contributions(scene: Scene, site: Site, passed: Passed, where: Tensor) -> Tensor:
    """What each head adds to the stream at some tokens (B,N), without the projection's bias:
    (K,H,C). passed: see `passing`; under the site's name, what passed through its projection.
    """
    given = passed[site.name][0]
    slices = by_head(scene.host.projection(scene.model, site), given, site.heads)
    return torch.einsum("khe,hec->khc", given[where].unflatten(-1, slices.shape[:2]), slices)


@torch.no_grad()
def neuron_gaps(scene: Scene, passage: Passage, layer: int, top: int = 10) -> tuple[Tensor, Tensor]:
    """The neurons of a feed-forward part that add most at the last token, |m_i| |W_i|, and the gap
    between right and wrong answer that each speaks for alone: (B,top) each.

    Raises:
        UnsupportedError: no down projection of a known name; no answers.
    """
    module = scene.host.feed_forward(scene.model, scene.chain[layer])
    down = next((m for n in DOWN if isinstance(m := getattr(module, n, None), nn.Module)), None)
    if down is None:
        raise UnsupportedError(WHO, f"{type(module).__name__} has no known down projection")
    norm, unembedding = scene.host.readout(scene.model)
    with passing({"down": down}) as passed:
        scene.model(**passage.inputs)
    active = passed["down"][0][positions(passage, LAST)]  # (B,I)
    rows = linear(down, torch.eye(active.shape[-1], dtype=active.dtype, device=active.device))
    chosen = (active.abs() * rows.norm(dim=-1)).topk(min(top, active.shape[-1]), dim=-1).indices
    bias = down(torch.zeros_like(active[:1]))
    said = active.gather(-1, chosen)[..., None] * rows[chosen] + bias
    return chosen, answer_gap(unembedding(norm(said)), passage, WHO)


def _run(
    scene: Scene, passage: Passage, forward: dict[str, nn.Module]
) -> tuple[Callable[[Tensor], Tensor], Passed]:
    """How to read a vector of the stream, and what passed through the model.

    Raises:
        UnsupportedError: what the unembedding reads is not what the final norm gives.
    """
    norm, unembedding = scene.host.readout(scene.model)
    modules = {s.name: scene.host.projection(scene.model, s) for s in scene.chain}
    modules |= {f"{name}.mlp": module for name, module in forward.items()}
    with passing({**modules, FINAL: norm, "unembedding": unembedding}) as passed:
        scene.model(**passage.inputs)
    if not torch.equal(passed[FINAL][1][:, -1], passed["unembedding"][0][:, -1]):
        raise UnsupportedError(WHO, "the unembedding does not read what the final norm gives")
    return (lambda x: unembedding(norm(x))), passed


def _said(logits: Tensor, passage: Passage, who: str) -> dict[str, Tensor]:
    """The metrics of logits (B,…,V)."""
    right = right_logit(logits, passage, WHO)
    found = {f"{who}_lens": (right - logits.mean(-1)).double()}
    if passage.wrong is not None:
        found[f"{who}_gap"] = answer_gap(logits, passage, WHO).double()
    return found


def _feed_forward(scene: Scene) -> tuple[dict[str, nn.Module], UnsupportedError | None]:
    """The feed-forward modules that are found, and why one is not."""
    found, missing = {}, None
    for site in scene.chain:
        try:
            found[site.name] = scene.host.feed_forward(scene.model, site)
        except UnsupportedError as error:
            missing = error
    return found, missing


CARD = ProbeCard(
    name=WHO,
    build=LogitLens,
    metrics={
        "head_lens": "logit the head alone gives the right answer, above the mean of all tokens",
        "head_gap": "right less wrong logit that the head alone gives",
    },
    layers={
        "mlp_lens": "logit the feed-forward part alone gives the right answer, above the mean",
        "mlp_gap": "right less wrong logit that the feed-forward part alone gives",
    },
    papers=(
        Paper(
            "2405.03205",
            "Anchored Answers: Unravelling Positional Bias in GPT-2's Multiple-Choice Questions",
            2024,
        ),
    ),
    claim=Claim("heads that copy name the answer", "regard atlas"),
)
