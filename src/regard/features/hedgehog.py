r"""Hedgehog feature map: a learned projection per head under an exponential, of both signs.

    phi(x) = [act(W x + b), act(-W x - b)]        x: (B,H,N,D) -> (B,H,N,2f)        W: (H,D,f)

act is a softmax over the f features of each half ("softmax", the default: positive, spiky, cannot
overflow), e^(x - max x) ("exp"), or one softmax over both halves of 2x together ("joint", as in the
flash-linear-attention library). "elu" and "relu" use one sign only: elu(x) + 1 and max(x, 0), f
features. Nothing falls below 1e-12, so rows never lose all their weight.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from regard.core.errors import ArgumentError
from regard.features.elu import elu_plus_one

Activation = Literal["softmax", "exp", "joint", "elu", "relu"]
_FLOOR = 1e-12


class HedgehogMap(nn.Module):
    """Feature map of one side (queries or keys), starting from the identity and no bias.

    Args:
        heads: H. head_dim: D. feature_dim: f, D unless given. bias: learn b (H,f) too.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        feature_dim: int | None = None,
        activation: Activation = "softmax",
        bias: bool = False,
    ) -> None:
        super().__init__()
        if activation not in get_args(Activation):
            raise ArgumentError("activation", f"one of {get_args(Activation)}", activation)
        width = feature_dim or head_dim
        self.activation: Activation = activation
        self.weight = nn.Parameter(torch.eye(head_dim, width).repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x (B,H,N,D) -> positive features (B,H,N,2f), or (B,H,N,f) for "elu" and "relu"."""
        heads, width, _ = self.weight.shape
        if x.shape[1] != heads or x.shape[3] != width:
            raise ArgumentError("x", f"(B, {heads}, N, {width})", tuple(x.shape))
        y = x @ self.weight
        if self.bias is not None:
            y = y + self.bias[:, None]
        return _activated(y, self.activation).clamp_min(_FLOOR)


def _activated(y: Tensor, activation: Activation) -> Tensor:
    if activation == "elu":
        return elu_plus_one(y)
    if activation == "relu":
        return y.relu()
    if activation == "joint":
        return torch.cat([2 * y, -2 * y], -1).softmax(-1)
    if activation == "softmax":
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)
    return torch.cat([(s - s.amax(-1, keepdim=True)).exp() for s in (y, -y)], -1)
