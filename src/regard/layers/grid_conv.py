r"""Depthwise convolution over the call's token grid, with its input added.

    y = x + DWConv_k(x) + b        x: (B, prefix + h*w, C), row-major

Zeros stand beyond the border and in padded tokens; prefix tokens pass by unchanged. Before a mixer
it is the conditional position encoding of CPVT (2102.10882); inside a feed-forward it adds
locality.
"""

from __future__ import annotations

from torch import Tensor, nn

from regard.core.boundary import grid_of
from regard.core.call import Call
from regard.core.errors import ArgumentError
from regard.features.grid import convolved
from regard.layers.attention import real_tokens

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class GridConv(nn.Module):
    """Residual depthwise convolution on a grid of `dims` axes, `kernel` odd."""

    def __init__(self, dim: int, kernel: int = 3, dims: int = 2) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ArgumentError("kernel", "an odd number", kernel)
        if dims not in _CONVOLUTIONS:
            raise ArgumentError("dims", "1, 2 or 3", dims)
        self.dims = dims
        self.conv = _CONVOLUTIONS[dims](dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor, call: Call = Call()) -> Tensor:
        """(B,N,C) -> (B,N,C); call.grid gives the side lengths."""
        x = real_tokens(x, call.padding)
        return x + convolved(x, self.conv, grid_of(call, self.dims, x.shape[1]), call.prefix)
