"""Text generated under a plan, and what the cache holds at its end."""

from __future__ import annotations

from typing import Any

import torch

from regard.bench.subject import Subject
from regard.core.errors import ArgumentError
from regard.plan import Plan


def generated(subject: Subject, plan: Plan, prompt: str, tokens: int) -> dict[str, Any]:
    """Up to `tokens` tokens after a prompt, the likeliest each: prompt_tokens (their number),
    tokens (ids), text, and cache, as the plan's report tells it.

    Raises:
        ArgumentError: an empty prompt, or one too long for the model.
        PlanError, UnsupportedError: the plan does not fit the model.
    """
    model, ids = subject.model, subject.encode(prompt)
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if not prompt or (most is not None and len(ids) + tokens > most):
        expected = "some text" if most is None else f"1 to {most - tokens} tokens of text"
        raise ArgumentError("prompt", expected, f"{len(ids)} tokens" if prompt else "none")
    inputs = torch.tensor([ids], device=model.device)
    with plan.applied(model) as run:
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=_padding(model.generation_config),
        )
        report = dict(run.report())
    found = out[0, len(ids) :].tolist()
    return {
        "prompt_tokens": len(ids),
        "tokens": found,
        "text": subject.decode(found),
        "cache": report,
    }


def _padding(settings: Any) -> int:
    """A token to pad with; nothing is padded, but models without one ask for it."""
    for token in (settings.pad_token_id, settings.eos_token_id):
        if isinstance(token, int):
            return token
    return 0
