r"""Blocks of a decayed recurrence: what fades between tokens of a block, and the gradient of it.

The log decay g <= 0 is (B,H,N,1), (1,H,1,1) where it is the same for all tokens, or None. Sums of g
run over the tokens between a key and its query and are never differences of running totals, so no
exponent is ever positive, small gaps keep their digits beside large ones, and g = -inf forgets
everything. A group is as many blocks as fit a workspace: memory beyond inputs and outputs does not
grow with N.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_ON_CPU = 1 << 17  # numbers in the largest tensor of a group: what a second-level cache holds
_ELSEWHERE = 1 << 25
_NOTHING = -1e4  # a log decay whose exponential is 0 in every dtype


@dataclass(frozen=True, eq=False)
class Fade:
    """Factors within blocks of c tokens, broadcasting over (B,H,G,·,·): `pairs` (c,c) as (key,
    query), 0 for keys after the query; since the block began (c,1), until it ends (c,1) and across
    it (1,1), None where nothing fades.
    """

    pairs: Tensor
    since: Tensor | None = None
    until: Tensor | None = None
    across: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Group:
    """Consecutive blocks: `rows` of the sequence, their shape (B,H,G,c), what fades in them."""

    rows: slice
    shape: tuple[int, int, int, int]
    fade: Fade

    def blocks(self, x: Tensor) -> Tensor:
        """Rows of x (B,H,N,D) as blocks (B*H*G,c,D)."""
        return x[:, :, self.rows].unflatten(2, self.shape[2:]).flatten(0, 2)

    def apart(self, x: Tensor) -> Tensor:
        """(B*H*G,·,·) -> (B*H,G,·,·)."""
        return x.unflatten(0, (-1, self.shape[2]))

    def across(self) -> Tensor | None:
        """What is kept across each block, (B*H,G,1,1)."""
        kept = self.fade.across
        return None if kept is None else kept.expand(*self.shape[:3], 1, 1).flatten(0, 1)

    def rejoined(self, x: Tensor) -> Tensor:
        """(B*H*G,c,D) -> (B,H,G*c,D)."""
        return x.view(*self.shape[:2], -1, x.shape[-1])

    def scaled(self, x: Tensor, factor: Tensor | None) -> Tensor:
        """Blocks x (B*H*G,·,·) times a factor of `fade`."""
        return x if factor is None else (x.view(*self.shape[:3], *x.shape[1:]) * factor).view_as(x)

    def scaled_(self, x: Tensor, factor: Tensor | None) -> Tensor:
        """As `scaled`, in place."""
        if factor is not None:
            x.view(*self.shape[:3], *x.shape[1:]).mul_(factor)
        return x


def spans(k: Tensor, width: int, size: int) -> Iterator[tuple[slice, int]]:
    """Rows of each group and the length of its blocks, `size` or a shorter rest, for a sequence k
    (B,H,N,F) whose widest row holds `width` numbers.
    """
    batch, heads, n, _ = k.shape
    size = min(size, n)
    room = _ON_CPU if k.device.type == "cpu" else _ELSEWHERE
    span = size * max(1, room // (batch * heads * size * max(size, width)))
    whole = n - n % size
    for start in range(0, whole, span):
        yield slice(start, min(start + span, whole)), size
    if whole < n:
        yield slice(whole, n), n - whole


def groups(k: Tensor, width: int, decay: Tensor | None, size: int) -> Iterator[Group]:
    """The groups of a sequence (see `spans`), with what fades in their blocks."""
    steady = decay is None or decay.shape[2] == 1
    fades: dict[int, Fade] = {}
    for rows, length in spans(k, width, size):
        if decay is not None and not steady:
            fade = _fade(decay[:, :, rows], length)
        else:
            fade = fades[length] = fades.get(length) or _steady(k, decay, length)
        blocks = (rows.stop - rows.start) // length
        yield Group(rows, (k.shape[0], k.shape[1], blocks, length), fade)


def _steady(k: Tensor, decay: Tensor | None, length: int) -> Fade:
    if decay is None:
        return Fade(k.new_ones(length, length).triu())
    return _fade(decay.expand(-1, -1, length, -1), length)


def _fade(decay: Tensor, length: int) -> Fade:
    decay = decay[..., 0].unflatten(2, (-1, length)).clamp(min=_NOTHING)
    ones = decay.new_ones(length, length)
    between = (ones.triu(1) * decay[..., None, :]) @ ones.triu()  # of tokens t: key < t <= query
    since = decay.cumsum(-1)
    until = F.pad(decay[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    return Fade(
        between.exp_().triu_(),
        since.exp()[..., None],
        until.exp_()[..., None],
        since[..., -1:, None].exp(),
    )


def carried(written: Tensor, across: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """States before each of G blocks, (B,H,G,F,E), and after the last, from what each writes."""
    before = torch.empty_like(written)
    for block in range(written.shape[2]):
        before[:, :, block] = state
        if across is None:
            state = state + written[:, :, block]
        else:
            kept = across[:, :, min(block, across.shape[2] - 1)]
            state = torch.addcmul(written[:, :, block], state, kept)
    return before, state


def decay_gradient(pairs: Tensor, reads: Tensor, writes: Tensor, across: Tensor) -> Tensor:
    """Gradient (n,c) of the log decay in n blocks from products value x gradient: of the weights
    (n,c,c) as (key, query), of reads from the state at the block's start (n,c), of writes to the
    state at its end (n,c), and of what is kept across it (n,1). Each t adds up what passes over it.
    """
    ones = torch.ones_like(pairs[0])
    passing = ((pairs @ ones.tril()).triu_(1)).sum(-2)  # keys j < t, queries i >= t
    return passing + reads @ ones.tril() + writes @ ones.triu(1) + across
