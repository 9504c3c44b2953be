"""Boundary checks: every public entry passes through here once, so that the inside may trust its
shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mask import Mask


def check_qkv(q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
    """Raise ArgumentError unless q (B,H,N,D), k (B,H_k,M,D), v (B,H_v,M,E) and the call's tensors
    fit together.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, tensor, q)
    batch, heads, _, width = q.shape
    if k.shape[0] != batch or k.shape[3] != width:
        raise ArgumentError("k", f"(B={batch}, H_k, M, D={width}) to match q", tuple(k.shape))
    if v.shape[0] != batch or v.shape[2] != k.shape[2]:
        raise ArgumentError("v", f"(B={batch}, H_v, M={k.shape[2]}, E) to match k", tuple(v.shape))
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[1] == 0 or heads % tensor.shape[1]:
            raise ArgumentError(
                f"{name}.shape[1]", f"a divisor of the {heads} query heads", tensor.shape[1]
            )
    check_call(call, batch, q.shape[2], k.shape[2])


def _check_tensor(name: str, tensor: object, like: object) -> None:
    if not isinstance(tensor, Tensor):
        raise ArgumentError(name, "a tensor", type(tensor).__name__)
    if tensor.ndim != 4:
        raise ArgumentError(name, "4 dimensions (B, H, N, D)", tuple(tensor.shape))
    if not tensor.is_floating_point():
        raise ArgumentError(name, "a floating-point tensor", tensor.dtype)
    if not isinstance(like, Tensor):
        return
    if tensor.dtype != like.dtype:
        raise ArgumentError(f"{name}.dtype", f"{like.dtype} as q", tensor.dtype)
    if tensor.device != like.device:
        raise ArgumentError(f"{name}.device", f"{like.device} as q", tensor.device)


def check_tokens(x: Tensor, dim: int, call: Call, context: Tensor | None = None) -> None:
    """Raise ArgumentError unless x is (B, N, dim) and the call fits (a context brings its own M
    keys).
    """
    for name, tensor in (("x", x), ("context", context)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.ndim != 3 or tensor.shape[-1] != dim:
            raise ArgumentError(
                name, f"a tensor (B, N, {dim})", getattr(tensor, "shape", type(tensor).__name__)
            )
        if not tensor.is_floating_point():
            raise ArgumentError(name, "a floating-point tensor", tensor.dtype)
    if context is not None and context.shape[0] != x.shape[0]:
        raise ArgumentError("context", f"batch {x.shape[0]} as x", tuple(context.shape))
    keys = x.shape[1] if context is None else context.shape[1]
    check_call(call, x.shape[0], x.shape[1], keys)


def check_call(call: Call, batch: int, n: int, m: int) -> None:
    """Raise ArgumentError unless the call's own fields fit a batch of n queries and m keys."""
    if not isinstance(call, Call):
        raise ArgumentError("call", "a regard.Call", type(call).__name__)
    if call.mask is not None and not isinstance(call.mask, Mask):
        raise ArgumentError(
            "call.mask",
            "a mask of the algebra such as Causal() (wrap a mask_mod in Given)",
            type(call.mask).__name__,
        )
    for name, tensor, length in (
        ("padding", call.padding, m),
        ("query_padding", call.query_padding, n),
    ):
        if tensor is None:
            continue
        if tensor.dtype != torch.bool:
            raise ArgumentError(f"call.{name}", "a boolean tensor, True = real token", tensor.dtype)
        if tuple(tensor.shape) != (batch, length):
            raise ArgumentError(f"call.{name}", f"shape ({batch}, {length})", tuple(tensor.shape))
    if call.grid is not None and _size(call.grid) + call.prefix not in (n, m):
        raise ArgumentError(
            "call.grid", f"{call.prefix} prefix tokens + a grid of {m} tokens in all", call.grid
        )


def refuse(call: Call, who: str, *names: str) -> None:
    """Raise UnsupportedError in the name of `who` if the call sets one of the named fields."""
    for name in names:
        if getattr(call, name) is not None:
            raise UnsupportedError(who, f"it cannot honour call.{name}")


def _size(grid: tuple[int, ...]) -> int:
    size = 1
    for side in grid:
        size *= side
    return size


def grid_of(call: Call, dims: int, tokens: int) -> tuple[int, ...]:
    """The call's grid, which must have `dims` axes; a 1-D grid may be left out."""
    if call.grid is None and dims == 1:
        return (tokens - call.prefix,)
    if call.grid is None:
        raise ArgumentError("call.grid", f"{dims} side lengths", None)
    if len(call.grid) != dims:
        raise ArgumentError("call.grid", f"{dims} side lengths", call.grid)
    return call.grid
