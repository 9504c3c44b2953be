"""One attention layer that reads labelled examples and answers for unlabelled ones.

An example is a token (x, y), a question (x, 0), both of width d+1; every head is as wide. The
answer is the last entry of what the layer gives for the question.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.study import Progress
from regard.layers.attention import Attention


def reader(dim: int, heads: int, seed: int) -> Attention:
    """A softmax attention layer for examples with x of width `dim`, its weights drawn by seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Attention(dim + 1, heads, head_dim=dim + 1)


def answers(layer: Attention, x: Tensor, y: Tensor, asked: Tensor) -> Tensor:
    """What the layer says (B,Q) at asked (B,Q,d) after examples x (B,N,d) labelled y (B,N)."""
    examples = torch.cat([x, y[..., None]], -1)
    return layer(F.pad(asked, (0, 1)), context=examples)[..., -1]


def fit(
    layer: Attention, loss: Callable[[], Tensor], steps: int, rate: float, progress: Progress
) -> list[float]:
    """Adam, its rate falling to zero in a line, on a loss that draws its own batch; the loss of
    every step.
    """
    optimiser = torch.optim.Adam(layer.parameters(), lr=rate)
    losses = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 - step / steps)
        found = loss()
        optimiser.zero_grad()
        found.backward()
        optimiser.step()
        losses.append(found.item())
        progress((step + 1) / steps)
    return losses


def circuits(layer: Attention) -> tuple[Tensor, Tensor]:
    """KQ = W_Q W_K^T and OV = W_V W_O of every head, in row convention: scores are x KQ x'^T before
    the scale, and a key x' that is read whole adds x' OV to the output. KQ (H,C,C), OV (H,C,out).
    """
    q, k, v = (p.weight.unflatten(0, (layer.heads, -1)) for p in _projections(layer))
    o = layer.o_proj.weight.unflatten(1, (layer.heads, -1))
    return torch.einsum("hdi,hdj->hij", q, k), torch.einsum("hdi,ohd->hio", v, o)


def _projections(layer: Attention) -> tuple[torch.nn.Linear, ...]:
    return layer.q_proj, layer.k_proj, layer.v_proj
