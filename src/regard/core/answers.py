"""The answer a passage asks for: where it is given, and what a forward says of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.passage import Passage
from regard.core.predictions import logits_of

LAST = -1


def real_tokens_of(passage: Passage) -> Tensor:
    """Which tokens are no padding, (B,N).

    Raises:
        UnsupportedError: the passage does not say its tokens.
    """
    if passage.tokens is None:
        raise UnsupportedError("experiment", "the passages have no tokens")
    return real_or_all(passage, passage.tokens)


def positions(passage: Passage, position: int | None) -> Tensor:
    """The `position`-th real token of each sequence, negative ones from the end, as a boolean
    (B,N); None: every real token.

    Raises:
        ArgumentError: a sequence is too short.
    """
    real = real_tokens_of(passage)
    if position is None:
        return real
    length = real.sum(-1)
    wanted = length + position if position < 0 else torch.full_like(length, position)
    if not bool(((wanted >= 0) & (wanted < length)).all()):
        raise ArgumentError("position", "a token of every sequence", position)
    return real & (real.cumsum(-1) - 1 == wanted[:, None])


def last_logits(output: Any, passage: Passage) -> Tensor:
    """Logits (B,V) after the last real token of each sequence; of classes, where a forward gives
    only these.
    """
    logits = logits_of(output)
    return logits if logits.ndim == 2 else logits[positions(passage, LAST)]


def right_answer(passage: Passage, who: str) -> Tensor:
    """The first token (B,) of the answer.

    Raises:
        UnsupportedError: the passage has none.
    """
    if passage.answer is None:
        raise UnsupportedError(who, "the passages have no `answer`")
    return passage.answer[:, 0] if passage.answer.ndim == 2 else passage.answer


def right_logit(logits: Tensor, passage: Passage, who: str) -> Tensor:
    """Of logits (B,…,V), those (B,…) of the right answer."""
    return _picked(logits, right_answer(passage, who))


def answer_gap(logits: Tensor, passage: Passage, who: str) -> Tensor:
    """Of logits (B,…,V), those of the right answer less those of the wrong one, (B,…).

    Raises:
        UnsupportedError: the passage has no right or no wrong answer.
    """
    if passage.wrong is None:
        raise UnsupportedError(who, "the passages have no `wrong` answer")
    return right_logit(logits, passage, who) - _picked(logits, passage.wrong)


def _picked(logits: Tensor, ids: Tensor) -> Tensor:
    index = ids.view(-1, *[1] * (logits.ndim - 1)).expand(*logits.shape[:-1], 1)
    return logits.gather(-1, index)[..., 0]


def real_or_all(passage: Passage, like: Tensor) -> Tensor:
    """Which tokens of `like` (B,N,…) are no padding, (B,N): all, unless the passage says of so many
    tokens which are.
    """
    padding = passage.padding
    if padding is not None and padding.shape == like.shape[:2]:
        return padding
    return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
