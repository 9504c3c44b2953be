r"""Mean ablation: a head gives the mean of its outputs, keeps its level and says nothing.

    o_i <- (1 - share) o_i + share m_i
    m_i = 1/n_i sum_{j <= i, j real} o_j        n_i: real tokens up to i;  or m_i = m from a file

Without a file each sequence is its own reference: the running mean of the head's own output,
padding left out (the mean of the whole sequence in an encoder), kept beside the cache while
decoding. With a file the mean is of other texts: a safetensors file with one tensor (heads, width)
per attention module, under the module's path, as `regard.recipes.head_means` writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.moment import Moment, Site
from regard.core.treatment import Treatment, TreatmentCard, Trial


@dataclass(frozen=True)
class MeanAblation(Treatment):
    """share: how much of the output the mean replaces; 0 changes nothing. file: a safetensors file
    of means; None: each sequence's own running mean.
    """

    share: float = 1.0
    file: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ArgumentError("share", "a fraction in [0, 1]", self.share)
        if self.file is not None and not Path(self.file).is_file():
            raise ArgumentError("file", "a safetensors file", self.file)

    @property
    def neutral(self) -> bool:
        return self.share == 0

    @cached_property
    def means(self) -> dict[str, Tensor]:
        """The file's tensors by name.

        Raises:
            ArgumentError: it is no safetensors file.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.file or "")
        except SafetensorError as error:
            raise ArgumentError("file", "a safetensors file", f"{self.file} ({error})") from error

    def check(self, site: Site, heads: tuple[int, ...]) -> None:
        if self.file is None:
            if site.cross:
                raise UnsupportedError("mean_ablation", "cross attention has no cache for a mean")
            return
        mean = self.means.get(site.name)
        if mean is None or mean.ndim != 2 or len(mean) != site.heads:
            shape = None if mean is None else tuple(mean.shape)
            raise ArgumentError("file", f"({site.heads}, width) under {site.name}", shape)

    def output(self, output: Tensor, at: Moment) -> Tensor:
        if self.file is None:
            mean = running_mean(output, at)
        else:
            mean = self.means[at.site.name][list(at.heads), None].to(output)
        return mean.expand_as(output) if self.share == 1 else output.lerp(mean, self.share)


def running_mean(output: Tensor, at: Moment) -> Tensor:
    """Mean of a head's outputs (B,h,N,E) over the real tokens up to each, or over all of them where
    attention is not causal.
    """
    wide = torch.promote_types(output.dtype, torch.float32)
    real = at.query_real[:, None, :, None]
    counts = real.to(wide).expand(-1, len(at.heads), -1, -1)
    sums = output.to(wide).masked_fill(~real, 0.0)
    if at.site.causal:
        sums, counts = _continued("sums", sums, at), _continued("counts", counts, at)
    else:
        sums, counts = (x.sum(2, keepdim=True) for x in (sums, counts))
    return (sums / counts.clamp_min(1)).to(output.dtype)


def _continued(name: str, x: Tensor, at: Moment) -> Tensor:
    """Running sums of x (B,h,N,·) over its tokens and those of earlier calls, which are remembered
    for all heads of the layer, (B,H,·).
    """
    chosen = torch.tensor(at.heads, device=x.device)
    before = at.memory.get(name)
    if before is None:
        before = x.new_zeros(x.shape[0], at.site.heads, x.shape[-1])
    sums = before[:, chosen, None] + x.cumsum(2)
    at.memory[name] = before.index_copy(1, chosen, sums[:, :, -1])
    return sums


CARD = TreatmentCard(
    name="mean_ablation",
    build=MeanAblation,
    papers=(
        Paper(
            "2211.00593",
            "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 "
            "small",
            2022,
        ),
    ),
    claim=Claim(
        "retrieval heads ablated by their mean lose retrieval, others hardly matter",
        "regard evaluate --plan mean_ablation.json --task needle",
    ),
    example=Trial(layers="1"),
    neutral={"share": 0.0},
)
