r"""Causal depthwise convolution with learned or implicit filters.

    y_t = sum_{j<K} h_j x_{t-j} + c        x: (B,N,C)  h: (C,K)  c: (C,)

Few taps are summed directly, in O(N K C); many by Fourier transform, in O(N log N C).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.padding import front_aligned

_DIRECT = 64  # taps up to which the sum is the cheaper way


@dataclass(frozen=True, eq=False)
class Recent:
    """Decode state: the last K-1 real tokens (B,K-1,C), zeros before the first."""

    tokens: Tensor


class LearnedTaps(nn.Module):
    """One number per channel and distance, with a bias."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        bound = kernel**-0.5
        self.weight = nn.Parameter(torch.empty(dim, kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound))

    def first(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Taps h (C,count) by distance, and the bias c (C,)."""
        return self.weight[:, :count], self.bias


class ImplicitTaps(nn.Module):
    """Taps computed from their relative distance by a small network; the token itself is added."""

    def __init__(self, dim: int, kernel: int, hidden: int = 16) -> None:
        super().__init__()
        self.kernel = kernel
        self.network = nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def first(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Taps h (C,count) by distance, no bias."""
        like = next(self.parameters())
        j = torch.arange(count, device=like.device, dtype=like.dtype)
        turn = 2e-4 * math.pi * j / self.kernel  # the published code has one, very slow frequency
        features = torch.stack([j / max(self.kernel - 1, 1), turn.cos(), -turn.sin()], -1)
        taps = self.network(features).T
        return torch.cat([taps[:, :1] + 1, taps[:, 1:]], 1), None


def causal_conv(x: Tensor, taps: LearnedTaps | ImplicitTaps) -> Tensor:
    """(B,N,C) -> (B,N,C); zeros stand before the first token."""
    tokens = x.shape[1]
    if tokens == 0:
        return x
    filters, bias = taps.first(min(taps.kernel, tokens))
    line = x.transpose(1, 2)  # (B, C, N)
    if taps.kernel <= _DIRECT:
        past = F.pad(line, (filters.shape[1] - 1, 0))
        y = F.conv1d(past, filters.flip(-1)[:, None], groups=x.shape[2])
    else:
        wide = torch.promote_types(x.dtype, torch.float32)
        spectrum = torch.fft.rfft(line.to(wide), 2 * tokens)
        spectrum = spectrum * torch.fft.rfft(filters.to(wide), 2 * tokens)
        y = torch.fft.irfft(spectrum, 2 * tokens)[..., :tokens].to(x.dtype)
    y = y.transpose(1, 2)
    return y if bias is None else y + bias


def carried_conv(
    x: Tensor, taps: LearnedTaps | ImplicitTaps, before: Recent | None, padding: Tensor | None
) -> tuple[Tensor, Recent]:
    """`causal_conv` of x (B,T,C) behind the tokens of `before`, and what to carry on. padding
    (B,T): tokens that are not real are skipped (their rows mean nothing).
    """
    aligned = None if padding is None else front_aligned(padding)
    new = x if aligned is None else aligned.front(x)
    past = x[:, :0] if before is None else before.tokens
    line = torch.cat([past, new], 1)
    y = causal_conv(line, taps)[:, past.shape[1] :]
    kept = taps.kernel - 1
    line = F.pad(line, (0, 0, kept - past.shape[1], 0))
    if aligned is None or padding is None:
        return y, Recent(line[:, line.shape[1] - kept :])
    index = padding.sum(-1, keepdim=True) + torch.arange(kept, device=x.device)
    recent = line.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    return aligned.back(y), Recent(recent)
