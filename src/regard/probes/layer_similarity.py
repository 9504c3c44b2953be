r"""Layer similarity: how little attention, feed-forward part and block turn the residual stream.

    S = mean_t cos(x_t, y_t)        x: the stream before, y: after it, (B,N,C)

A part with S = 1 does nothing and can be dropped. The stream between attention and feed-forward
part is known where a block adds what its attention gives to its input (pre-norm); elsewhere whole
blocks are measured alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.answers import real_or_all
from regard.core.card import Claim, Paper
from regard.core.errors import UnsupportedError
from regard.core.moment import Site
from regard.core.passage import Passage
from regard.core.passing import block_of, passing
from regard.core.probe import Finding, ProbeCard
from regard.core.scene import Scene
from regard.importance.layer_similarity import similarity_by_sequence
from regard.treatments.layer_drop import LayerDrop

Stream = dict[str, tuple[Tensor, Tensor, Tensor]]
"""By attention module: the stream before it, after it, and after its block (B,N,C)."""


@dataclass(frozen=True)
class LayerSimilarity:
    """No options; one forward per passage."""

    @torch.no_grad()
    def run(self, scene: Scene) -> Iterator[tuple[Passage, Site, Finding]]:
        sites = scene.chain
        unknown = _unknown_middle(scene, sites)
        for passage in scene.passages:
            with streams(scene, sites) as found:
                scene.model(**passage.inputs)
            for site in sites:
                layers = _similarities(passage, found[site.name])
                if unknown is not None:
                    layers = {"block_similarity": layers["block_similarity"]}
                yield passage, site, Finding(layers=layers)
        if unknown is not None:
            raise unknown


@contextmanager
def streams(scene: Scene, sites: Sequence[Site]) -> Iterator[Stream]:
    """A context at whose end a forward has left its residual stream at every site."""
    names = {name for site in sites for name in (site.name, block_of(site))}
    found: Stream = {}
    with passing({name: scene.model.get_submodule(name) for name in names}) as passed:
        yield found
    for site in sites:
        (before, after), own = passed[block_of(site)], passed[site.name][1]
        if not before.shape == own.shape == after.shape:
            raise UnsupportedError("experiment", f"{site.name} adds to no stream of its block")
        found[site.name] = (before, before + own, after)


def _similarities(passage: Passage, stream: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    before, middle, after = stream
    real = real_or_all(passage, before)
    pairs = {"attention": (before, middle), "mlp": (middle, after), "block": (before, after)}
    return {f"{n}_similarity": similarity_by_sequence(x, y, real) for n, (x, y) in pairs.items()}


def _unknown_middle(scene: Scene, sites: Sequence[Site]) -> UnsupportedError | None:
    """Why the stream between attention and feed-forward part is not known: without feed-forward
    parts a block must give its input plus what its attention gives. None: it is.
    """
    try:
        with scene.treated(LayerDrop("mlp"), *sites), streams(scene, sites) as found:
            scene.model(**scene.passages[0].inputs)
    except UnsupportedError as error:
        return error
    for name, (_, middle, after) in found.items():
        if not torch.allclose(middle, after, rtol=1e-3, atol=1e-3 * float(after.abs().amax())):
            return UnsupportedError("layer similarity", f"the block of {name} is not pre-norm")
    return None


CARD = ProbeCard(
    name="layer_similarity",
    build=LayerSimilarity,
    layers={
        "attention_similarity": "cosine of the stream before and after attention; 1: it is idle",
        "mlp_similarity": "cosine of the stream before and after the feed-forward part",
        "block_similarity": "cosine of the stream before and after the block",
    },
    papers=(
        Paper("2406.15786", "What Matters in Transformers? Not All Attention is Needed", 2024),
    ),
    claim=Claim("deep attention parts turn the stream least", "regard atlas"),
)
