r"""Sequence-parallel attention: every process holds a shard of the sequence, keys and values
travel.

    ring, online:       o = merge_s attend(q, k_s, v_s)      (o, lse) of shard s as it passes by
    ring, materialised: s = concat_s q k_s^T,  a = normalise(s),  o = sum_s a_s v_s
    split keys:         o = merge_r attend(q, k_r, v_r)      all queries everywhere, keys split

Sequence Parallelism (2105.13120) is the materialised ring; the online one keeps no row of scores.
Splitting keys and merging is the distributed multi-head attention of 2302.06218. Positions travel
with the keys, so every mask of the algebra works on any layout; `balanced_shard` deals causal work
evenly. Each hop is differentiable: its gradient travels the other way round.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from regard.core.call import Call, Result
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.merge import merge
from regard.core.scored import attend, without_padding
from regard.core.weights import (
    Scored,
    group_scores,
    group_values,
    modified_scores,
    normalised,
    scale_of,
)


def balanced_shard(length: int, rank: int, size: int) -> Tensor:
    """Positions of a rank's tokens so that causal work is even: two chunks, one from either end.

    `length` must be a multiple of 2 * size.
    """
    if length % (2 * size):
        raise ArgumentError("length", f"a multiple of {2 * size} (twice the processes)", length)
    chunks = torch.arange(length).reshape(2 * size, -1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def ring_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    method: Scored,
    *,
    mode: Literal["online", "materialised"] = "online",
    group: ProcessGroup | None = None,
) -> Result:
    """Attention of this process's queries q (B,H,n,D) to the keys of all processes.

    k (B,H_k,m,D), v (B,H_v,m,E): this process's shard; call.query_positions (n,) and
    call.key_positions (m,) are global and required; call.padding marks this shard's real keys.
    Every process calls with the same shapes and method.

    Raises:
        ArgumentError: positions are missing, or the processes disagree on shapes (on every
            process).
        UnsupportedError: a score modification or key bias, which is bound to local indices.
    """
    _check(q, k, v, call, method, group)
    if mode == "online":
        return _online(q, k, v, call, method, group)
    if mode == "materialised":
        return _materialised(q, k, v, call, method, group)
    raise ArgumentError("mode", "'online' or 'materialised'", mode)


def split_keys_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    method: Scored,
    *,
    group: ProcessGroup | None = None,
) -> Result:
    """Attention of the same queries q (B,H,N,D) on every process to keys split over processes.

    Each process attends to its own shard; partial results are exchanged and merged by their
    log-sum-exp. Positions are required as in `ring_attend`. Every process returns the whole result.
    """
    _check(q, k, v, call, method, group)
    part = attend(q, k, v, call, method, need_lse=True)
    outputs, lses = _gathered(part.output, group), _gathered(part.row_lse, group)
    return merge([Result(o, s) for o, s in zip(outputs, lses, strict=True)])


def _online(
    q: Tensor, k: Tensor, v: Tensor, call: Call, method: Scored, group: ProcessGroup | None
) -> Result:
    parts = []
    for shard in _shards(k, v, call, group):
        parts.append(attend(q, shard.k, shard.v, shard.call(call), method, need_lse=True))
    return merge(parts)


def _materialised(
    q: Tensor, k: Tensor, v: Tensor, call: Call, method: Scored, group: ProcessGroup | None
) -> Result:
    scores, seen, values = [], [], []
    for shard in _shards(k, v, call, group):
        own = shard.call(call)
        clean_q, clean_k, clean_v = without_padding(q, shard.k, shard.v, own)
        frame, mask = own.frame(q, shard.k), own.visibility(method.mask)
        part = group_scores(clean_q, clean_k) * scale_of(call, method.scale, q.shape[-1])
        scores.append(modified_scores(part, method, frame.all(), clean_q))
        ones = torch.ones(1, 1, *part.shape[2:], dtype=torch.bool, device=q.device)
        visible = ones if mask is None else mask.dense(frame)
        seen.append(visible.expand(q.shape[0], q.shape[1], *part.shape[2:]))
        values.append(clean_v)
    rows, visible = torch.cat(scores, -1), torch.cat(seen, -1)
    weights, lse = normalised(rows, visible, method.normalise, method.normalise.kind == "online")
    return Result(group_values(weights, torch.cat(values, 2)), lse)


class _Shard:
    """Keys and values of one process, as they pass by, with their positions and padding."""

    def __init__(self, k: Tensor, v: Tensor, positions: Tensor, real: Tensor | None) -> None:
        self.k, self.v, self.positions, self.real = k, v, positions, real

    def call(self, call: Call) -> Call:
        """The call as it holds for these keys."""
        return call.but(key_positions=self.positions, padding=self.real)

    def passed_on(self, group: ProcessGroup | None) -> _Shard:
        """What arrives when every process sends its shard to the next."""
        real = None if self.real is None else _sent(self.real.to(torch.uint8), 1, group).bool()
        k, v = _Hop.apply(self.k, group), _Hop.apply(self.v, group)
        return _Shard(k, v, _sent(self.positions, 1, group), real)  # type: ignore[arg-type]


def _shards(k: Tensor, v: Tensor, call: Call, group: ProcessGroup | None) -> Any:
    """The own shard, then those of the others, once round the ring."""
    if call.key_positions is None:
        raise ArgumentError("call.key_positions", "global positions of this shard's keys", None)
    shard = _Shard(k, v, call.key_positions, call.padding)
    yield shard
    for _ in range(dist.get_world_size(group) - 1):
        shard = shard.passed_on(group)
        yield shard


class _Hop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _sent(x, 1, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _sent(gradients[0], -1, ctx.group), None


def _sent(x: Tensor, direction: int, group: ProcessGroup | None) -> Tensor:
    """Send x to the neighbour in a direction, return what comes from the other one."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if size == 1:
        return x.clone()
    arrived = torch.empty_like(x, memory_format=torch.contiguous_format)
    to, source = (rank + direction) % size, (rank - direction) % size
    if group is not None:
        to, source = dist.get_global_rank(group, to), dist.get_global_rank(group, source)
    hops = [
        dist.P2POp(dist.isend, x.contiguous(), to, group),
        dist.P2POp(dist.irecv, arrived, source, group),
    ]
    for work in dist.batch_isend_irecv(hops):
        work.wait()
    return arrived


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0][dist.get_rank(ctx.group)], None


def _gathered(x: Tensor, group: ProcessGroup | None) -> list[Tensor]:
    """x of every process; the gradient of each process's own result flows to its own part."""
    stacked: Any = _Gather.apply(x, group)
    return list(stacked.unbind(0))


def _check(
    q: Tensor, k: Tensor, v: Tensor, call: Call, method: Scored, group: ProcessGroup | None
) -> None:
    facts = [tuple(q.shape), tuple(k.shape), tuple(v.shape), str(q.dtype), call.padding is not None]
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, facts, group=group)
    for rank, other in enumerate(every):
        if other != every[0]:
            raise ArgumentError(
                "q, k, v", f"{every[0]} as on process 0", f"{other} on process {rank}"
            )
    if call.query_positions is None or call.key_positions is None:
        raise ArgumentError("call.query_positions, call.key_positions", "global positions", None)
    if method.score or method.block_bias or method.key_bias is not None:
        raise UnsupportedError("sequence-parallel attention", "scores bound to local key indices")
