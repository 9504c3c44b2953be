r"""Flex executor: a scored softmax mechanism through PyTorch's compiled flex_attention.

Our masks and scores have its signatures already; the block mask is built from the intervals a mask
knows, so that no N x M matrix is made. Compiled once per process and set of shapes. On a CPU it has
no backward pass; such calls are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from regard.core.blocks import tiles_of
from regard.core.frame import Frame
from regard.core.mask import Mask
from regard.core.tiling import BLOCK
from regard.core.weights import Scored, ScoreMod, Softmax


def flex_lacks(q: Tensor, k: Tensor, v: Tensor, method: Scored, need_lse: bool) -> str:
    """Why flex_attention cannot serve, or an empty string."""
    if not isinstance(method.normalise, Softmax):
        return f"its normaliser is softmax, not {type(method.normalise).__name__}"
    if method.block_bias is not None:
        return "it takes no bias per block"
    if 0 in (q.shape[2], k.shape[2]):
        return "it needs at least one query and one key"
    if q.device.type != "cpu":
        return ""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *method.captures)):
        return "it has no backward pass on a CPU"
    if q.dtype == torch.float64:
        return "it takes no float64 on a CPU"
    return "it returns no log-sum-exp on a CPU" if need_lse else ""


@dataclass(frozen=True, eq=False)
class Flexed:
    """What flex_attention needs besides q, k and v."""

    frame: Frame
    mask: Mask | None
    method: Scored
    scale: float
    need_lse: bool


def run_flex(q: Tensor, k: Tensor, v: Tensor, work: Flexed) -> tuple[Tensor, Tensor | None]:
    """Output (B,H,N,E) and, on request, log-sum-exp (B,H,N); k and v have one number of heads."""
    found = compiled()(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        score_mod=_score_mod(work.method),
        block_mask=None if work.mask is None else block_mask(work.frame, work.mask),
        scale=work.scale,
        enable_gqa=k.shape[1] != q.shape[1],
        **(_lse_request() if work.need_lse else {}),
    )
    if not work.need_lse:
        return found, None
    out, aux = found
    return out, aux if isinstance(aux, Tensor) else aux.lse


def _lse_request() -> dict[str, Any]:
    """How this PyTorch is asked for the log-sum-exp."""
    if "return_aux" not in inspect.signature(flex_attention).parameters:
        return {"return_lse": True}
    from torch.nn.attention.flex_attention import AuxRequest

    return {"return_aux": AuxRequest(lse=True)}


@cache
def compiled() -> Callable[..., Any]:
    """flex_attention, compiled for each set of shapes; past the compiler's limit it raises instead
    of falling back to the slow interpreted form.
    """
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _score_mod(method: Scored) -> ScoreMod | None:
    bias, score = method.key_bias, method.score
    if bias is None:
        return score
    many, heads = bias.shape[0] > 1, bias.shape[1] > 1

    def biased(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        s = s + bias[b if many else b * 0, h if heads else h * 0, j]
        return s if score is None else score(s, b, h, i, j)

    return biased


def block_mask(frame: Frame, mask: Mask, block: int = BLOCK) -> BlockMask:
    """A flex block mask from the bounds of our mask; blocks nobody sees are not listed."""
    n, m = frame.query_positions.shape[-1], frame.key_positions.shape[-1]
    some, full = mask.bounds(tiles_of(frame, block, block))
    shape = torch.broadcast_shapes(some.shape, full.shape, (1, 1, -(-n // block), -(-m // block)))
    some, full = some.expand(shape), full.expand(shape)
    whole = torch.arange(1, shape[-1] + 1, device=some.device) * block <= m
    full = (
        full & whole & ((torch.arange(1, shape[-2] + 1, device=some.device) * block <= n)[:, None])
    )
    partial_count, partial = _listed(some & ~full)
    full_count, full_list = _listed(some & full)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial,
        full_count,
        full_list,
        BLOCK_SIZE=block,
        mask_mod=mask.mask_mod(frame),
        seq_lengths=(n, m),
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Counts (B,H,nq) and indices (B,H,nq,nk) of chosen blocks, the chosen ones first."""
    order = (~chosen).to(torch.int32).argsort(dim=-1, stable=True)
    return chosen.sum(-1).to(torch.int32), order.to(torch.int32)
