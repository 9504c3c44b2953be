"""Pictures with a question, for models that read both in one sequence: the picture's tokens have
the role `image`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.bench.showing.exhibit import Exhibit
from regard.bench.showing.grids import Grid, seen_grid
from regard.bench.showing.pictures import READS, pictures
from regard.bench.showing.vision import seen
from regard.core.errors import ArgumentError
from regard.core.passage import Passage

QUESTION = "What is in this picture?"
PLAIN = "the tokenizer has no chat template: the question stands after the picture as it is"
FOLDED = "image_grid_thw"
"""An input of models whose patches are not row by row, so that they are on no grid."""
AROUND = ("vision_start_token_id", "vision_end_token_id")


def image_token(config: Any) -> int | None:
    """The id that stands for a piece of a picture in a sequence of text, if there is one."""
    names = ("image_token_id", "image_token_index")
    found = (getattr(config, name, None) for name in names)
    return next((x for x in found if isinstance(x, int)), None)


def spectator(model: Any, processor: Any, tokenizer: Any) -> Exhibit:
    """A model that is asked about a picture."""
    own = image_token(model.config) or 0

    def show(path: Path | None, examples: int, length: int) -> list[Passage]:
        found = []
        for _, picture in pictures(path, examples):
            inputs = seen(model, processor, picture)
            features, grid = seen_grid(model, inputs, model.get_image_features)
            ids = _asked(model, tokenizer, own, _count(features))
            found.append(_passage(model, tokenizer, ids, inputs, grid))
        return found

    plain = () if getattr(tokenizer, "chat_template", None) else (PLAIN,)
    return Exhibit(model, f"{READS}, which it is asked about", show, plain)


def _passage(
    model: Any, tokenizer: Any, ids: list[int], inputs: Mapping[str, Any], seen: Grid
) -> Passage:
    tokens = torch.tensor([ids])
    image = tokens == image_token(model.config)
    inputs = {**inputs, "input_ids": tokens}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = image.long()
    grid, prefix = (None, 0) if FOLDED in inputs else seen
    if grid is not None and grid[0] * grid[1] + prefix == len(ids):
        grid, prefix = None, 0  # else the text, being as long, would be taken for the picture
    words = [tokenizer.convert_ids_to_tokens(ids)]
    return Passage(inputs, tokens, words, {"image": image}, grid, prefix)


def _count(features: Any) -> int:
    """How many tokens a picture's features take, (n,C) per picture."""
    parts = getattr(features, "pooler_output", features)
    parts = list(parts) if isinstance(parts, Tensor) else parts
    return sum(part.shape[0] for part in parts)


def _asked(model: Any, tokenizer: Any, own: int, count: int) -> list[int]:
    """The question's ids with `count` tokens `own` for the picture.

    Raises:
        ArgumentError: the tokenizer, or its template, has no token for a picture.
    """
    if getattr(tokenizer, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        turn = [{"role": "user", "content": content}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)
        ids = list(ids["input_ids"])
    else:
        before, after = (getattr(model.config, name, None) for name in AROUND)
        lead, rest = (tokenizer(text).input_ids for text in ("", f"\n{QUESTION}"))
        start, end = ([x] if isinstance(x, int) else [] for x in (before, after))
        ids = [*lead, *start, own, *end, *rest[len(lead) :]]
    if ids.count(own) != 1:
        raise ArgumentError(
            "MODEL", "a tokenizer that sets one token for a picture", ids.count(own)
        )
    at = ids.index(own)
    return [*ids[:at], *[own] * count, *ids[at + 1 :]]
