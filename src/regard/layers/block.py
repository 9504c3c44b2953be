r"""The pre-norm residual block around any mixer of tokens.

    x = x + mixer(norm(x))        x = x + feed_forward(norm(x))        x: (B,N,C)

Vision variants: a grid convolution before the mixer, before the feed-forward, or both (DaViT); one
residual around mixer and feed-forward together (SpectFormer); a learned factor on each branch
(CaiT's layer scale, 2103.17239).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.call import Call
from regard.core.errors import ArgumentError, UnsupportedError
from regard.layers.attention import real_tokens
from regard.layers.grid_conv import GridConv


class Block(nn.Module):
    """Pre-norm residual block.

    Args:
        dim: width C. mixer: a layer, called as mixer(x, call) or mixer(x, call, context).
            feed_forward: called as feed_forward(x, call); None = the block only mixes.
        norm: builds a norm of a given width. cpe_first, cpe_second: kernel of the grid convolution
            before the mixer and before the feed-forward, 0 = none. single_residual: x +
            feed_forward(norm(mixer(norm(x)))). layer_scale: initial factor on each branch, None =
            no factor.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        feed_forward: nn.Module | None = None,
        *,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        cpe_first: int = 0,
        cpe_second: int = 0,
        single_residual: bool = False,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        if feed_forward is None and (single_residual or cpe_second):
            raise ArgumentError("feed_forward", "a module for single_residual or cpe_second", None)
        self.mixer: Any = mixer
        self.feed_forward = feed_forward
        self.norm1 = norm(dim)
        self.norm2 = None if feed_forward is None else norm(dim)
        self.cpe_first = GridConv(dim, cpe_first) if cpe_first else None
        self.cpe_second = GridConv(dim, cpe_second) if cpe_second else None
        self.single_residual = single_residual
        branches = 1 if feed_forward is None or single_residual else 2
        self.factors = (
            None
            if layer_scale is None
            else nn.Parameter(torch.full((branches, dim), float(layer_scale)))
        )

    def forward(self, x: Tensor, call: Call = Call(), context: Tensor | None = None) -> Tensor:
        """(B,N,C) -> (B,N,C); a cross mixer reads from `context` (B,M,C)."""
        own = call if context is None else call.but(padding=call.query_padding)
        x = real_tokens(x, own.padding)
        if self.cpe_first is not None:
            x = self.cpe_first(x, own)
        normed = self.norm1(x)
        mixed = self.mixer(normed, call) if context is None else self.mixer(normed, call, context)
        return self._after(x, mixed, own)

    def step(self, x: Tensor, state: Any, call: Call) -> tuple[Tensor, Any]:
        """Causal decoding of new tokens x (B,T,C) after the mixer's `state` (None at the start)."""
        if self.cpe_first is not None or self.cpe_second is not None:
            raise UnsupportedError("Block", "a grid convolution sees later tokens")
        if not hasattr(self.mixer, "step"):
            raise UnsupportedError(type(self.mixer).__name__, "it has no decoding step")
        x = real_tokens(x, call.padding)
        mixed, state = self.mixer.step(self.norm1(x), state, call)
        return self._after(x, mixed, call), state

    def _after(self, x: Tensor, mixed: Tensor, call: Call) -> Tensor:
        """The rest of the block, given the mixer's output."""
        if self.feed_forward is None or self.norm2 is None:
            return x + self._scaled(mixed, 0)
        if self.single_residual:
            return x + self._scaled(self.feed_forward(self.norm2(mixed), call), 0)
        x = x + self._scaled(mixed, 0)
        if self.cpe_second is not None:
            x = self.cpe_second(x, call)
        return x + self._scaled(self.feed_forward(self.norm2(x), call), 1)

    def _scaled(self, branch: Tensor, index: int) -> Tensor:
        return branch if self.factors is None else self.factors[index] * branch
