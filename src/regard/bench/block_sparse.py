"""The probe of block-sparse attention: random blocks of keys through the tiled executor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench.clock import clocked
from regard.bench.gate import LENGTH, judged
from regard.bench.probes import STANDARD, Found, passed, timed_fields
from regard.bench.rivals import Rivals
from regard.bench.timing import Pace
from regard.core.call import Call
from regard.core.scored import Impl, attend
from regard.core.weights import Scored
from regard.masks.blocks import Blocks

BLOCK = 128


@dataclass(frozen=True)
class Sparse:
    """Time of attention to random blocks of keys, per density, in units of SDPA's time: every row
    of blocks of every head sees its own `density` of the blocks, not causal.
    """

    density: float
    length: int

    @property
    def unit(self) -> str:
        return "× density × the time of SDPA"

    @property
    def setting(self) -> str:
        return f"N={self.length}, blocks of {BLOCK}, forward"

    def measure(self, pace: Pace) -> Found:
        small = self._rivals(LENGTH, torch.float32, "tiled")
        truth = self._rivals(LENGTH, torch.float64, "dense")
        checked = passed("random blocks", judged(small, truth, "forward"))
        found = clocked(self._rivals(self.length, torch.float32, "tiled").works("forward"), pace)
        return Found(1 / found["speedup"].median / self.density, timed_fields(found, checked))

    def _rivals(self, length: int, dtype: torch.dtype, impl: Impl) -> Rivals:
        draw = torch.Generator().manual_seed(0)
        shape = (3, STANDARD.batch, STANDARD.heads, length, STANDARD.head_dim)
        inputs = torch.randn(shape, generator=draw).to(dtype).unbind(0)
        blocks = -(-length // BLOCK)
        order = torch.rand(1, STANDARD.heads, blocks, blocks, generator=draw).argsort(-1)
        mask = Blocks(order < max(1, round(self.density * blocks)), BLOCK)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, Call(), Scored(mask=mask), impl=impl).output

        return Rivals((length,), False, inputs, run, F.scaled_dot_product_attention)
