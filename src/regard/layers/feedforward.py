r"""The feed-forward network of a block: every token on its own, or with its grid neighbours.

    y = W_2 act(W_1 x)        gated: y = W_2 (act(W_1 x) ⊙ W_3 x)        x: (B,N,C)

act is GELU (gated: SiLU, "GLU Variants Improve Transformer", 2002.05202). `conv` puts a depthwise
grid convolution, its input added, before W_2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.call import Call
from regard.layers.grid_conv import GridConv


class FeedForward(nn.Module):
    """(B,N,dim) -> (B,N,dim) through `hidden` channels; conv: kernel of the grid convolution, 0 =
    none.
    """

    def __init__(
        self, dim: int, hidden: int, *, gated: bool = False, conv: int = 0, bias: bool = True
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.gate = nn.Linear(dim, hidden, bias=bias) if gated else None
        self.conv = GridConv(hidden, conv) if conv else None
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor, call: Call = Call()) -> Tensor:
        """(B,N,C) -> (B,N,C)."""
        inner = self.fc1(x)
        inner = F.gelu(inner) if self.gate is None else F.silu(inner) * self.gate(x)
        if self.conv is not None:
            inner = self.conv(inner, call)
        return self.fc2(inner)
