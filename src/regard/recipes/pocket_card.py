"""The pocket language model's files: weights, configuration, and a card of what it was measured to
do.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from regard.recipes.llama import saved_llama
from regard.recipes.measures import answered, first_token_share, generated, perplexity
from regard.tasks.induction import Induction
from regard.tasks.needle import Needle
from regard.tasks.text import Text

LENGTHS = (256, 512, 1024)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
DATA = {
    "facts, copies": "symbols drawn at random by regard.tasks.needle and regard.tasks.induction",
    "text": "the documentation topics (pydoc_data.topics) and the top-level modules of the standard"
    " library of the Python that trained it, read from that installation; eight documents of ten",
    "licence of the text": "PSF License Version 2 (python.org); no text is shipped with the model",
}


def save_with_card(model: Any, folder: Path, training: dict[str, Any]) -> dict[str, Any]:
    """Write config.json, model.safetensors (float16) and card.json, and return the card, whose
    scores are those of the files as they load. `training` says how the model was trained.
    """
    model.to(torch.float16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    reader = saved_llama(folder)
    card = {
        "name": "language",
        "summary": "a Llama that retrieves facts planted in text, copies, and predicts bytes",
        "parameters": sum(weight.numel() for weight in reader.parameters()),
        "licence": "Apache-2.0",
        "command": "python -m regard.recipes.pocket_language --out DIR",
        "training": {**training, **versions()},
        "data": DATA,
        "scores": scores(reader),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return card


def versions() -> dict[str, str]:
    """What the weights depend on besides the recipe."""
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def scores(model: Any) -> dict[str, Any]:
    """All that the card claims, measured on test examples and held-out text."""
    needle = {str(n): generated(model, Needle(n, examples=512)) for n in LENGTHS}
    depth = {str(d): generated(model, Needle(LENGTHS[-1], depth=d, examples=128)) for d in DEPTHS}
    recall = {str(n): answered(model, Needle(n, facts=16, asked=16)) for n in LENGTHS}
    copies = {str(n): answered(model, Induction(n, 4, 48)) for n in (64, *LENGTHS)}
    induction = {str(n): answered(model, Induction(n, 4, 48, fill="text")) for n in LENGTHS}
    return {
        "needle": {"what": "4 facts, one asked, whole answers generated; by length", **needle},
        "needle by depth": {"what": "the same at 1024 tokens, by depth of the fact", **depth},
        "recall": {"what": "16 facts, all asked, tokens answered; by length", **recall},
        "copying": {"what": "segments over and over, tokens answered; by length", **copies},
        "induction": {"what": "a segment twice in text, tokens answered; by length", **induction},
        "perplexity": {"what": "per byte of held-out text", "1024": perplexity(model, Text())},
        "first token": {"what": "attention it gets at 512, (layers, heads)", "share": sinks(model)},
    }


def sinks(model: Any) -> list[list[float]]:
    """Attention to the first token on test text of 512 bytes, rounded, (layers, heads)."""
    inputs = next(Text(512, examples=8).batches("test", 8)).inputs
    model.set_attn_implementation("eager")
    shares = first_token_share(model, inputs)
    model.set_attn_implementation("sdpa")
    return [[round(share, 3) for share in layer] for layer in shares]
