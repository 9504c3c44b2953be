r"""ALiBi: scores fall linearly with distance, at one fixed rate per head.

    s_ij -> s_ij - m_h |p_i - p_j|        m_h = 2^(-8 h / H), h = 1 … H        s: (B,H,N,M)

p are absolute positions ("Train Short, Test Long", 2108.12409). Where H is no power of two, the
rates of the largest power below it come first, then every second rate of twice that power.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.frame import Frame
from regard.core.weights import ScoreMod


def alibi_slopes(heads: int) -> list[float]:
    """The rate of each head."""
    power = 1 << (heads.bit_length() - 1)
    first = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    between = [2.0 ** (-4 * (h + 1) / power) for h in range(0, 2 * (heads - power), 2)]
    return first + between


def alibi(frame: Frame, *, signed: bool = False) -> ScoreMod:
    """The score modification in a call's coordinates.

    signed: subtract m (p_i - p_j) without the absolute value, so that later keys gain; the same
    thing under a causal mask.
    """
    slopes = torch.tensor(
        alibi_slopes(frame.heads), dtype=torch.float64, device=frame.key_positions.device
    )

    def fall(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        pairs = frame.at(b, h, q_idx, kv_idx)
        distance = pairs.query - pairs.key
        return score - slopes.to(score.dtype)[h] * (distance if signed else distance.abs())

    return fall
