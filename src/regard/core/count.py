"""Counted cost: floating-point operations of a call, from the operations it really runs, not from
seconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_FREE = {
    "view",
    "reshape",
    "expand",
    "transpose",
    "permute",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "detach",
    "alias",
}
_FREE |= {
    "as_strided",
    "t",
    "empty",
    "unbind",
    "split",
    "_unsafe_view",
    "lift_fresh",
    "_reshape_alias",
    "split_with_sizes",
}
_FREE |= {
    "_local_scalar_dense",
    "empty_like",
    "new_empty",
    "diagonal",
    "unfold",
    "view_as_real",
    "view_as_complex",
}


_READS = {"index", "gather", "index_select", "embedding", "take"}


class _Elements(TorchDispatchMode):
    """Counts one operation per element that a non-view, non-matmul operation writes or reduces."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in _FREE:
            self.total += max(_largest(out), 0 if name in _READS else _largest(args))
        return out


def _largest(values: Any) -> int:
    if isinstance(values, torch.Tensor):
        return values.numel()
    if isinstance(values, (tuple, list)):
        return max((_largest(v) for v in values), default=0)
    return 0


def _fused_forward(
    query: Any,
    key: Any,
    value: Any,
    dropout: float = 0.0,
    causal: bool = False,
    attn_mask: Any = None,
    scale: Any = None,
    out_shape: Any = None,
) -> int:
    """Two products over all pairs, or over the visible half; arguments arrive as shapes."""
    batch, heads, n, width = query
    return 2 * batch * heads * n * key[2] * (width + value[3]) // (2 if causal else 1)


def _fused_backward(
    gradient: Any,
    query: Any,
    key: Any,
    value: Any,
    *rest: Any,
    attn_mask: Any = None,
    scale: Any = None,
    out_shape: Any = None,
) -> int:
    """Scores again, then four products: gradients of weights, values, queries and keys."""
    batch, heads, n, width = query
    causal = len(rest) > 3 and rest[3]  # after output, log-sum-exp and dropout
    pairs = batch * heads * n * key[2] // (2 if causal else 1)
    return 2 * pairs * (3 * width + 2 * value[3])


_FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _fused_backward,
}


class count_flops:
    """Context manager; afterwards `flops` holds the operations run inside, forward and backward
    alike.

    Matrix products and convolutions count two per multiply–add, everything else one per element
    read or written.
    """

    def __enter__(self) -> count_flops:
        self._matmul = FlopCounterMode(display=False, custom_mapping=_FUSED)
        self._elements = _Elements()
        self._matmul.__enter__()
        self._elements.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._elements.__exit__(*exc)
        self._matmul.__exit__(*exc)
        self.flops = self._matmul.get_total_flops() + self._elements.total
