"""The probe of the high/low split: HiLo beside the layers its authors compare it with, at their
setting.

The authors' benchmark of single layers takes 64 images of 14 x 14 cells, 768 wide, in 12 heads, and
finds HiLo (windows of 2, nine heads in ten low) 1.4 times as fast as spatial reduction by 2 and 1.6
times as fast as windows of 7 on their CPU. The rivals below compute what theirs do; attention
itself runs through the same fused kernel as ours, which makes them faster than published.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.bench.clock import clocked
from regard.bench.gate import judged
from regard.bench.probes import Found, passed, timed_fields
from regard.bench.rivals import Setting, rivals
from regard.bench.spec import Spec
from regard.bench.timing import Pace

SIDE = 14
IMAGES = Setting(batch=64, heads=12, head_dim=64)
HILO = Spec(name="hilo", options={"window": 2, "alpha": 0.9, "bias": True})


class SpatialReduction(nn.Module):
    """Attention from every cell to square patches, each projected to one key and one value
    (2102.12122), (B, side*side, dim) -> the same.
    """

    def __init__(self, dim: int, heads: int, side: int, ratio: int = 2) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.reduce = nn.Conv2d(dim, dim, ratio, ratio)
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens."""
        image = x.transpose(1, 2).unflatten(2, (self.side, self.side))
        patches = self.norm(self.reduce(image).flatten(2).transpose(1, 2))
        k, v = self.kv(patches).chunk(2, -1)
        return self.proj(attended(self.q(x), k, v, self.heads))


class LocalWindows(nn.Module):
    """Attention within square windows that tile the image (2103.14030, not shifted, without
    relative positions), (B, side*side, dim) -> the same.
    """

    def __init__(self, dim: int, heads: int, side: int, window: int = 7) -> None:
        super().__init__()
        self.heads, self.grid = heads, (side // window, window, side // window, window)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens."""
        windows = x.unflatten(1, self.grid).transpose(2, 3)  # (B,rows,columns,w,w,C)
        q, k, v = self.qkv(windows.flatten(3, 4).flatten(0, 2)).chunk(3, -1)
        mixed = self.proj(attended(q, k, v, self.heads))
        return mixed.reshape(windows.shape).transpose(2, 3).reshape(x.shape)


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention of q (B,N,C) to k, v (B,M,C) in heads."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class HighLow:
    """How many times faster than a rival HiLo is."""

    rival: Literal["spatial reduction", "local windows"]

    @property
    def unit(self) -> str:
        return f"× faster than {self.rival}"

    @property
    def setting(self) -> str:
        shape = f"H{IMAGES.heads} D{IMAGES.head_dim}"
        return f"{IMAGES.batch} images of {SIDE}×{SIDE} cells, {shape}, forward"

    def measure(self, pace: Pace) -> Found:
        size, few = (SIDE, SIDE), IMAGES.model_copy(update={"batch": 2})
        measured, truth = rivals(HILO, size, few), rivals(HILO, size, few, truth=True)
        checked = passed("hilo", judged(measured, truth, "forward"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            kinds = {"spatial reduction": SpatialReduction, "local windows": LocalWindows}
            rival = kinds[self.rival](IMAGES.dim, IMAGES.heads, SIDE).eval()
        both = replace(rivals(HILO, size, IMAGES), baseline=rival)
        found = clocked(both.works("forward"), pace)
        return Found(found["speedup"].median, timed_fields(found, checked))
