"""Loading of the pocket models. `python -m regard.recipes.pocket_language` made the language model;
its folder here holds weights, configuration and the card with its measured scores.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.core.errors import UnknownNameError
from regard.tasks.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

HERE = Path(__file__).parent
NAMES = ["language"]


def language() -> tuple[LlamaForCausalLM, Vocabulary]:
    """The pocket language model, in evaluation mode and float32, and its vocabulary.

    A Llama of transformers like any other: it takes ids (B,N), generates, and accepts every plan.
    It retrieves facts planted in text, copies, and predicts bytes: how well, `card("language")`
    says.

    Raises:
        UnsupportedError: transformers is missing; `pip install 'regard[transformers]'` brings it.
    """
    from regard.recipes.llama import saved_llama

    return saved_llama(HERE / "language"), Vocabulary()


def card(name: str) -> dict[str, Any]:
    """How a pocket model was made, from what, and what it was measured to do.

    Raises:
        UnknownNameError: no pocket model has that name.
    """
    if name not in NAMES:
        raise UnknownNameError("pocket model", name, NAMES)
    return json.loads((HERE / name / "card.json").read_text())
