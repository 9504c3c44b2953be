"""Passages whose answers are the model's own: what a search keeps of it without any labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.passage import Passage


@torch.no_grad()
def own_answers(model: Any, passages: Sequence[Passage], tokens: int) -> tuple[Passage, ...]:
    """Passages with what the model says next, greedily, as the answer (B,T), all of it scored.

    Raises:
        ArgumentError: fewer than one token, or padding on the right.
        UnsupportedError: a model that does not generate, or a passage of other inputs than ids.
    """
    if tokens < 1:
        raise ArgumentError("tokens", "at least 1", tokens)
    if not callable(getattr(model, "generate", None)):
        raise UnsupportedError("own answers", f"{type(model).__name__} does not generate")
    found = []
    for passage in passages:
        ids = passage.inputs.get("input_ids")
        if ids is None:
            raise UnsupportedError("own answers", "a passage has no input_ids")
        mask = passage.inputs.get("attention_mask", torch.ones_like(ids))
        if not bool(mask[:, -1].all()):
            raise ArgumentError("attention_mask", "padding on the left", "right")
        said = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        found.append(replace(passage, answer=said[:, ids.shape[1] :], scored=None))
    return tuple(found)
