r"""Pooling tokens into one vector: what the attentive pools share, and the plain mean.

    y = mean_n x_n        x: (B,N,C) -> y: (B,C)

Padded tokens are left out everywhere; of a sequence without real tokens the mean is zero.
"""

from __future__ import annotations

from torch import Tensor, nn

from regard.core.boundary import check_tokens
from regard.core.call import Call
from regard.core.errors import ArgumentError
from regard.core.scored import attend
from regard.core.weights import Scored


class MeanPool(nn.Module):
    """(B,N,C) -> (B,C): what a linear probe reads."""

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """padding (B,N): True = real."""
        return mean(*admitted(x, x.shape[-1], padding))


def admitted(x: Tensor, dim: int, padding: Tensor | None) -> tuple[Tensor, Call]:
    """x (B,N,dim) with padded tokens set to zero, and the call that hides them.

    Raises:
        ArgumentError: other shapes.
    """
    call = Call(padding=padding)
    check_tokens(x, dim, call)
    return x if padding is None else x.masked_fill(~padding[..., None], 0.0), call


def mean(x: Tensor, call: Call) -> Tensor:
    """Mean (B,C) of admitted tokens x (B,N,C)."""
    if call.padding is None:
        return x.sum(1) / max(x.shape[1], 1)
    return x.sum(1) / call.padding.sum(1, keepdim=True).clamp_min(1)


def asked(own: Tensor, given: Tensor | None, batch: int) -> Tensor:
    """The queries (B,Q,C): a pool's own (Q,C), or those given instead, (1 or B,Q,C)."""
    if given is None:
        return own.expand(batch, -1, -1)
    expected = (batch, *own.shape)
    if given.shape not in (expected, (1, *own.shape)):
        raise ArgumentError("queries", f"shape {expected}", tuple(given.shape))
    return given.expand(expected)


def split(x: Tensor, heads: int) -> Tensor:
    """(B,N,H*D) -> (B,H,N,D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def read(
    q: Tensor, k: Tensor, v: Tensor, heads: tuple[int, int], call: Call, scale: float | None = None
) -> Tensor:
    """Softmax attention of q (B,Q,H*D) over k (B,N,G*D) and v (B,N,G*E) with (H, G) query and key
    heads: (B,Q,H*E). scale: None = 1/sqrt(D).
    """
    own, shared = heads
    o = attend(split(q, own), split(k, shared), split(v, shared), call, Scored(scale=scale)).output
    return o.transpose(1, 2).flatten(2)


def check_heads(dim: int, heads: int) -> None:
    """Raise ArgumentError unless `heads` divides the width."""
    if dim < 1 or heads < 1 or dim % heads:
        raise ArgumentError("heads", f"a divisor of dim={dim}", heads)
