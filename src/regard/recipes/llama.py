"""The one place where recipes reach for transformers, an optional extra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from regard.core.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM


def llama_classes() -> tuple[type[LlamaConfig], type[LlamaForCausalLM]]:
    """The classes of the pocket language model and of its configuration.

    Raises:
        UnsupportedError: transformers is missing.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        lacks = "transformers is missing (pip install 'regard[transformers]')"
        raise UnsupportedError("the pocket language model", lacks) from error
    return LlamaConfig, LlamaForCausalLM


def random_llama(shape: dict[str, Any]) -> LlamaForCausalLM:
    """A Llama with random weights, drawn from PyTorch's global generator; `shape` holds the fields
    of its configuration.

    Raises:
        UnsupportedError: transformers is missing.
    """
    config, llama = llama_classes()
    return llama(config(**shape))


def saved_llama(folder: Path) -> LlamaForCausalLM:
    """The Llama saved in a folder, in float32 and evaluation mode.

    Raises:
        UnsupportedError: transformers is missing.
    """
    config, llama = llama_classes()
    with torch.random.fork_rng(devices=[]):
        model = llama(config.from_pretrained(folder, local_files_only=True)).float()
    weights = load_file(folder / "model.safetensors")
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model.eval()
