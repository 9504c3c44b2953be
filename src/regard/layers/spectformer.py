r"""Spectral gating: one learned filter per channel multiplies the image's Fourier transform.

    y_c = irfft2( W_c ⊙ rfft2(x_c) )        x: (B, h*w, C)  W: (C, h, w//2+1), complex

It is a circular convolution with a kernel as large as the image: mixing does not look at content.
SpectFormer uses it in its first blocks, with one residual around gating and feed-forward, and
ordinary attention in the others. The filter fits one grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.boundary import check_tokens, refuse
from regard.core.call import Call
from regard.core.card import Card, Claim, Cost, Example, Golden, Paper
from regard.core.errors import ArgumentError
from regard.features.grid import image_sides
from regard.layers.attention import real_tokens
from regard.layers.block import Block
from regard.layers.feedforward import FeedForward


class SpectFormer(nn.Module):
    """Spectral gating network, (B,h*w,C) -> (B,h*w,C) on the one grid (h,w) it is built for.

    Args:
        dim: width C. heads: not used, every channel has its own filter. grid: (h, w).
    """

    def __init__(self, dim: int, heads: int = 1, *, grid: tuple[int, int] = (14, 14)) -> None:
        super().__init__()
        if len(grid) != 2 or min(grid) < 1:
            raise ArgumentError("grid", "two positive side lengths", grid)
        self.dim, self.grid = dim, (int(grid[0]), int(grid[1]))
        self.weight = nn.Parameter(0.02 * torch.randn(grid[0], grid[1] // 2 + 1, dim, 2))

    def forward(self, x: Tensor, call: Call = Call()) -> Tensor:
        """Noncausal; padded cells of call.padding count as zeros."""
        check_tokens(x, self.dim, call)
        refuse(call, "spectformer", "scale")
        if image_sides(call, x.shape[1], "spectformer") != self.grid:
            raise ArgumentError("call.grid", f"{self.grid}, for which the filter is", call.grid)
        image = real_tokens(x, call.padding).unflatten(1, self.grid)  # (B,h,w,C)
        wide = torch.promote_types(x.dtype, torch.float32)
        spectrum = torch.fft.rfft2(image.to(wide), dim=(1, 2), norm="ortho")
        gated = spectrum * torch.view_as_complex(self.weight.to(wide).contiguous())
        y = torch.fft.irfft2(gated, s=self.grid, dim=(1, 2), norm="ortho")
        return y.flatten(1, 2).to(x.dtype)


def convert(
    config: Mapping[str, Any], state: Mapping[str, Any], grid: tuple[int, int] | None = None
) -> SpectFormer:
    """A gating network with the authors' weights; without `grid` it is square, as they build it."""
    module = SpectFormer(config["dim"], grid=grid or (config["h"], config["h"]))
    module.load_state_dict({"weight": state["complex_weight"]})
    return module


def _gating(case: Mapping[str, Any]) -> dict[str, Any]:
    inputs = case["inputs"]
    height, width = (int(side) for side in inputs["spatial_size"])
    module = convert(case["config"], case["state_dict"], (height, width))
    return {"y": module(inputs["x"], Call(grid=module.grid))}


def _block(case: Mapping[str, Any]) -> dict[str, Any]:
    config, state = case["config"], case["state_dict"]
    mixer = convert(config, {"complex_weight": state["filter.complex_weight"]})
    dim = config["dim"]
    hidden = int(dim * config.get("mlp_ratio", 4.0))
    block = Block(dim, mixer, FeedForward(dim, hidden), single_residual=True).eval()
    names = {"filter.complex_": "mixer.", "mlp.": "feed_forward."}
    own = {}
    for name, tensor in state.items():
        start = next((s for s in names if name.startswith(s)), "")
        own[names.get(start, "") + name.removeprefix(start)] = tensor
    block.load_state_dict(own)
    return {"y": block(case["inputs"]["x"], Call(grid=mixer.grid))}


_SOURCE, _COMMIT = "badripatro/SpectFormers", "b6cf487"

SPECTFORMER = Card(
    name="spectformer",
    kind="layer",
    build=SpectFormer,
    papers=(
        Paper(
            "2304.06446",
            "SpectFormer: Frequency and Attention is what you need in a Vision Transformer",
            2023,
        ),
    ),
    family="free",
    patterns=("noncausal self",),
    grids=(2,),
    cost=Cost(time=1, state="none"),
    claim=Claim(
        "reads digits without looking at content when it mixes tokens",
        "regard compare --task digits --mechanisms 'softmax,spectformer(grid=(8,8))'",
    ),
    example=Example(grid=(5, 6), sized=lambda size: {"grid": size}),
    goldens=(
        Golden("132_spectral_gating.pt", _gating, _SOURCE, _COMMIT),
        Golden("132_spectral_block.pt", _block, _SOURCE, _COMMIT),
    ),
    convert=convert,
)
