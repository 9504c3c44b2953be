"""What a search goes by: the loss, the accuracy or the entropy of what a model predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.passage import Passage
from regard.core.predictions import Predictions

By = Literal["accuracy", "loss", "entropy"]
READ = {"input_ids", "attention_mask"}


def whole(passage: Passage) -> Passage:
    """A passage whose answer, if it has one, is read in the same forward as the prompt; what is
    scored is the answer then.

    Raises:
        UnsupportedError: an answer to a prompt that is more than ids and a mask, or other tokens.
    """
    answer = passage.answer
    if answer is None:
        return passage
    ids, mask = passage.inputs.get("input_ids"), passage.inputs.get("attention_mask")
    known = isinstance(ids, Tensor) and passage.tokens is not None and ids.equal(passage.tokens)
    if not isinstance(ids, Tensor) or not known or not set(passage.inputs) <= READ:
        raise UnsupportedError("search", "answers are read after ids and their mask alone")
    scored = torch.ones_like(answer, dtype=torch.bool)
    scored = scored if passage.scored is None else passage.scored
    inputs = {"input_ids": torch.cat([ids, answer], 1)}
    if mask is not None:
        inputs["attention_mask"] = F.pad(mask, (0, answer.shape[1]), value=1)
    return Passage(
        inputs,
        inputs["input_ids"],
        domain=passage.domain,
        scored=F.pad(scored, (ids.shape[1], 0)),
    )


def predicted(model: Any, passage: Passage) -> Predictions:
    """What a model says of a passage in one forward, its answer included."""
    passage = whole(passage)
    return Predictions.of(model(**passage.inputs), passage)


@torch.no_grad()
def judged(model: Any, passages: Sequence[Passage], by: By) -> float:
    """How good a model's predictions of passages are, the more the better, as a mean over their
    sequences: the share of tokens (or classes) told right, the loss or the entropy in nats, both
    less than 0. An entropy asks for no truth.

    Raises:
        ArgumentError: another measure; nothing to predict.
    """
    if by not in get_args(By):
        raise ArgumentError("by", f"one of {get_args(By)}", by)
    each = [_each(predicted(model, passage), by) for passage in passages]
    found = torch.cat([x[~x.isnan()] for x in each]) if each else torch.zeros(0)
    if not len(found):
        raise ArgumentError("passages", "something to predict", f"{len(each)} without")
    return float(found.mean())


def _each(found: Predictions, by: By) -> Tensor:
    """One number (B,) per sequence: the mean over what counts; NaN where nothing does."""
    if by == "loss":
        return -found.losses()
    if by == "accuracy":
        values = (found.logs.argmax(-1) == found.targets).double()
    else:
        values = -torch.special.entr(found.logs.exp()).sum(-1).double()
    return values.masked_fill(~found.counted, 0.0).sum(-1) / found.counted.sum(-1)
