"""A layer behind a short causal convolution, so that a token knows its predecessors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from regard.core.call import Call
from regard.core.errors import UnsupportedError
from regard.core.mask import Causal
from regard.layers.base_conv import BaseConv


class Convolved(nn.Module):
    """A mechanism behind a causal convolution of `taps` taps (0 = none)."""

    def __init__(self, dim: int, taps: int, mixer: nn.Module) -> None:
        super().__init__()
        self.conv = BaseConv(dim, kernel=taps) if taps else None
        self.mixer: Any = mixer

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """(B,N,C) -> (B,N,C)."""
        if self.conv is not None:
            x = self.conv(x, call.but(mask=Causal()))
        return self.mixer(x, call)

    def step(self, x: Tensor, state: Any, call: Call) -> tuple[Tensor, Any]:
        """Decoding; the state is the convolution's and the mechanism's."""
        recent, carried = (None, None) if state is None else state
        if self.conv is not None:
            x, recent = self.conv.step(x, recent, call)
        if not hasattr(self.mixer, "step"):
            raise UnsupportedError(type(self.mixer).__name__, "it has no decoding step")
        y, carried = self.mixer.step(x, carried, call)
        return y, (recent, carried)
