"""Tiles of (B,H,N,D) tensors inside Triton kernels: addresses by strides, so that no view is
copied, and tails that read as zero.

Kernels see a tensor as a `Heads` tuple. Query head h reads head h // group of it, which is how
grouped heads need no repeated keys. The width must be a power of two, the last stride 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Heads(NamedTuple):
    """A (B,H,N,D) tensor as a kernel argument: data, strides, rows, and query heads per head."""

    data: Any
    batch: int
    head: int
    row: int
    length: int
    group: int


def heads(x: Tensor, query_heads: int) -> Heads:
    """x (B,H,N,D), copied only if its last axis is not dense, as a kernel argument."""
    if x.stride(3) != 1:
        x = x.contiguous()
    return Heads(x, x.stride(0), x.stride(1), x.stride(2), x.shape[2], query_heads // x.shape[1])


@triton.jit
def place(x, batch, head, rows, columns):
    """Addresses of rows x columns of one query head's share of x, and which of them exist."""
    start = x.data + batch.to(tl.int64) * x.batch + (head // x.group).to(tl.int64) * x.head
    spots = start + rows.to(tl.int64)[:, None] * x.row + columns[None, :]
    return spots, (rows < x.length)[:, None]


@triton.jit
def load(x, batch, head, rows, columns):
    """The tile rows x columns; rows past the end are zero."""
    spots, real = place(x, batch, head, rows, columns)
    return tl.load(spots, mask=real, other=0.0)


@triton.jit
def store(x, batch, head, rows, columns, tile):
    """Write a tile, leaving out rows past the end."""
    spots, real = place(x, batch, head, rows, columns)
    tl.store(spots, tile.to(x.data.dtype.element_ty), mask=real)


INTERPRETED = not isinstance(load, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1 when they were imported)."""
_WIDENED = tl.constexpr(INTERPRETED)  # its product takes the bits of bfloat16 for integers


@triton.jit
def product(a, b, PRECISE: tl.constexpr = tl.constexpr(True)):
    """a @ b, summed in float32; float32 factors keep all their digits if PRECISE, else as many as
    16-bit numbers have, with float32's range.
    """
    if _WIDENED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee" if PRECISE else "tf32")
