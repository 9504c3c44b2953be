r"""Vision-aware head divergence: how far a head's output moves when the image is removed.

    VHD_h = ||o_h(image, text) - o_h(text)||_2        at the last token, which predicts the next
    T-VHD = sum of the `top` largest VHD_h of a layer, summed over layers

o_h is what head h gives before the output projection. Heads that move far but give much without the
image as well count as zero; those above the median of their layer then are the layer's vision-aware
half (importance/head_divergence.py). Without the image the text moves up, to earlier positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.answers import LAST, positions
from regard.core.card import Claim, Golden, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.moment import Site
from regard.core.outputs import Noted
from regard.core.passage import Passage
from regard.core.probe import Finding, ProbeCard
from regard.core.scene import Scene
from regard.importance.head_divergence import above_median, divergence, loud

WHO = "vision_divergence"
IMAGE = "image"
POSITIONS = ("attention_mask", "position_ids", "cache_position")
"""Inputs that the model makes anew for the text alone."""


@dataclass(frozen=True)
class VisionDivergence:
    """top: heads whose divergence is summed up for a layer. squared: whether what a head gives
    without the image is told by the square of its norm (as the paper prints it), or by its norm.
    midpoint: whether the median of an even number of heads lies between the two in the middle.
    """

    top: int = 8
    squared: bool = True
    midpoint: bool = False

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ArgumentError("top", "1 or more", self.top)

    @torch.no_grad()
    def run(self, scene: Scene) -> Iterator[tuple[Passage, Site, Finding]]:
        for passage in scene.passages:
            image = _image_of(passage)
            last = positions(passage, LAST)
            full = _outputs(scene, passage.inputs, last)
            texts = [text_alone(passage, image, row) for row in range(len(image))]
            alone = [_outputs(scene, text, _end(text)) for text in texts]
            for site in scene.chain:
                without = torch.cat([outputs[site.name] for outputs in alone])
                yield passage, site, self.found(full[site.name], without)

    def found(self, outputs: Tensor, without: Tensor) -> Finding:
        """The numbers of one layer's outputs (B,H,E), with the image and without."""
        moved = divergence(outputs, without)
        kept, aware = self.aware(moved, without)
        most = moved.topk(min(self.top, moved.shape[-1]), dim=-1).values.sum(-1)
        metrics = {"vision_divergence": moved, "vision_kept": kept, "vision_aware": aware.double()}
        return Finding(metrics, layers={"vision_divergence_top": most})

    def aware(self, moved: Tensor, without: Tensor) -> tuple[Tensor, Tensor]:
        """Divergences (…,H) with those of loud heads at zero, and which heads are vision-aware."""
        kept = moved.masked_fill(loud(moved, without, squared=self.squared), 0.0)
        return kept, above_median(kept, midpoint=self.midpoint)


def text_alone(passage: Passage, image: Tensor, row: int) -> dict[str, Tensor]:
    """The inputs of one sequence of a passage without its image (B,N) and without padding.

    Raises:
        UnsupportedError: no text is left.
    """
    kept = ~image[row]
    if passage.padding is not None:
        kept = kept & passage.padding[row]
    if not bool(kept.any()):
        raise UnsupportedError(WHO, "without the image nothing is left")
    return {
        name: x[row : row + 1, kept]
        for name, x in passage.inputs.items()
        if isinstance(x, Tensor) and x.shape[:2] == image.shape and name not in POSITIONS
    }


def _image_of(passage: Passage) -> Tensor:
    """Which tokens (B,N) are the image's.

    Raises:
        UnsupportedError: nothing says so, or they are not among the model's inputs.
    """
    if passage.tokens is None or IMAGE not in passage.roles:
        raise UnsupportedError(WHO, "nothing says which tokens are of role 'image'")
    if "input_ids" not in passage.inputs:
        raise UnsupportedError(WHO, "the passages are no `input_ids`, from which to take an image")
    return passage.roles[IMAGE]


def _end(text: Mapping[str, Tensor]) -> Tensor:
    """The last token, (1,N)."""
    return torch.arange(text["input_ids"].shape[1])[None] == text["input_ids"].shape[1] - 1


def _outputs(scene: Scene, inputs: Mapping[str, Any], where: Tensor) -> dict[str, Tensor]:
    """What the heads of every layer of the text's tower give at the tokens `where`: (B,H,E)."""
    noted = Noted(where)
    with scene.treated(noted, *scene.chain):
        scene.model(**inputs)
    return noted.found


def replay(case: Mapping[str, Any]) -> dict[str, Any]:
    """VHD, T-VHD, and the heads that are reinforced by both readings of the paper."""
    full, without = (case["inputs"][f"head_out_{name}"] for name in ("full", "no_image"))
    moved = divergence(full, without)
    top = VisionDivergence(top=case["config"]["topk"]).found(full, without)
    found: dict[str, Any] = {"vhd": moved, "t_vhd": top.layers["vision_divergence_top"].sum()}
    found["variants"], found["reinforced"] = {}, {}
    for name, squared in (("ta_norm", False), ("ta_squared_norm", True)):
        kept, lower = VisionDivergence(squared=squared).aware(moved, without)
        middle = VisionDivergence(squared=squared, midpoint=True).aware(moved, without)[1]
        found["variants"][name] = {
            "outlier": loud(moved, without, squared=squared),
            "vhd_pruned": kept,
            "selected_lower_median": lower,
            "selected_mean_median": middle,
        }
        gain = torch.where(lower[..., None], case["config"]["alpha"], 1.0)
        found["reinforced"][name] = full * gain
    return found


CARD = ProbeCard(
    name="vision_divergence",
    build=VisionDivergence,
    metrics={
        "vision_divergence": "how far the head's output moves without the image, a distance",
        "vision_kept": "the same, 0 where the head gives much without the image too",
        "vision_aware": "share of sequences in which that is above the layer's median",
    },
    layers={"vision_divergence_top": "sum of the largest divergences of its heads"},
    papers=(
        Paper(
            "2412.13949",
            "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
            2024,
        ),
    ),
    claim=Claim(
        "few heads of a layer answer to the image",
        "regard atlas path/to/llava --probes vision_divergence",
    ),
    goldens=(
        Golden(
            "36_vhr.pt",
            replay,
            "https://arxiv.org/abs/2412.13949",
            "v3",
        ),
    ),
)
