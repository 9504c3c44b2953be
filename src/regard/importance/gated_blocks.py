r"""Gated blocks: which blocks of keys a block of queries reads, by a gate's word.

P = softmax over blocks b <= a of G_ab        read b if P_ab > threshold, or if among the best
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.call import Call
from regard.core.errors import ArgumentError
from regard.core.sequence import in_sequence
from regard.features.block_gate import BlockGate
from regard.features.rotary import rotary_angles


def check_budget(threshold: float | None, density: float | None, dense_rows: int) -> None:
    """Raise ArgumentError unless exactly one of the two says how much is read."""
    if (threshold is None) == (density is None):
        raise ArgumentError("threshold, density", "exactly one of the two", (threshold, density))
    if density is not None and not 0 < density <= 1:
        raise ArgumentError("density", "a fraction in (0, 1]", density)
    if dense_rows < 0:
        raise ArgumentError("dense_rows", "0 or more", dense_rows)


def gate_logits(
    gate: BlockGate,
    q: Tensor,
    k: Tensor,
    call: Call,
    *,
    rope: float | None = None,
    heads: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """G (B,h,n,n) of self-attention's q (B,h,N,D), k (B,h_k,N,D), -inf above the diagonal, and each
    sequence's number of blocks (B or 1,). Padding is left out, wherever it stands.
    """
    alignment, fringe = in_sequence(call, q, k).alignment, -k.shape[2] % gate.block
    q, k = (F.pad(alignment.front(x), (0, 0, 0, fringe)) for x in (q, k))
    real = F.pad(alignment.padding, (0, fringe))
    place = torch.arange(q.shape[2] // gate.block, device=q.device)
    angles = None if rope is None else rotary_angles(place * gate.block, gate.width, rope)
    logits = gate(q, k, real, angles, heads).masked_fill(place > place[:, None], float("-inf"))
    return logits, -(-real.sum(-1) // gate.block)


def chosen_blocks(
    weights: Tensor,
    count: Tensor,
    *,
    threshold: float | None,
    density: float | None,
    dense_rows: int = 2,
    own: bool = True,
) -> Tensor:
    """Which blocks are read, boolean (B,H,n,n), by the gate's P (B,H,n,n); count (B or 1,): blocks
    of each sequence. own: a block reads itself in any case.
    """
    number, count = (
        torch.arange(weights.shape[-1], device=weights.device),
        count[:, None, None, None],
    )
    if threshold is not None:
        keep = weights > threshold
    else:
        share = 1 - math.sqrt(1 - (density or 0.0))
        rank = weights.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        keep = rank < (count.double() * share).long().clamp_min(1)
    keep = keep | (number[:, None] >= count - dense_rows)
    if own:
        keep = keep | (number == number[:, None])
    return keep & (number <= number[:, None])
